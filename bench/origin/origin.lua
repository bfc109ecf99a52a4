-- GCS's JSON and XML read dialects for nginx, over files listed in an index or over pairs that are computed.
local origin = {}

local index = {} -- of files: {name, size, crc32c, md5, generation}, sorted by name
local of_name = {}
local pairs_of_objects = 0 -- computed: train/images/0000000.jpg, ..., train/labels/0000000.png, ...
local UPDATED = "2026-01-01T00:00:00.000Z"
local LARGEST_PAGE = 1000

function origin.load(path)
  for line in io.lines(path) do
    local name, size, crc32c, md5, generation = line:match("^([^\t]+)\t([^\t]+)\t([^\t]+)\t([^\t]+)\t([^\t]+)$")
    local object = { name = name, size = size, crc32c = crc32c, md5 = md5, generation = generation }
    index[#index + 1] = object
    of_name[name] = object
  end
end

function origin.compute(pairs)
  pairs_of_objects = pairs
end

local function count()
  return pairs_of_objects > 0 and 2 * pairs_of_objects or #index
end

local function name_at(place)
  if pairs_of_objects == 0 then
    return index[place].name
  elseif place <= pairs_of_objects then
    return string.format("train/images/%07d.jpg", place - 1)
  end
  return string.format("train/labels/%07d.png", place - 1 - pairs_of_objects)
end

local function object_at(place)
  if pairs_of_objects == 0 then
    return index[place]
  end
  local bytes = string.char(0, math.floor(place / 65536) % 256, math.floor(place / 256) % 256, place % 256)
  local generation = string.format("17000000%08d", place)
  return { name = name_at(place), size = "100000", crc32c = ngx.encode_base64(bytes), generation = generation }
end

local function first_from(name)
  local low, high = 1, count() + 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if name_at(middle) < name then
      low = middle + 1
    else
      high = middle
    end
  end
  return low
end

-- Names come as they were written into the index: nothing in them needs to be escaped.
local function resource(bucket, object, brief)
  local item = '{"name":"' .. object.name .. '","generation":"' .. object.generation .. '","size":"' .. object.size
    .. '","crc32c":"' .. object.crc32c .. '"'
  if brief then
    return item .. "}"
  end
  local md5 = object.md5 and ',"md5Hash":"' .. object.md5 .. '"' or ""
  return item .. md5 .. ',"kind":"storage#object","bucket":"' .. bucket .. '","metageneration":"1","storageClass":"STANDARD",'
    .. '"contentType":"application/octet-stream","timeCreated":"' .. UPDATED .. '","updated":"' .. UPDATED .. '"}'
end

local function respond(body)
  ngx.header["Content-Type"] = "application/json; charset=UTF-8"
  ngx.header["Content-Length"] = #body
  ngx.print(body)
end

local function not_found()
  ngx.status = 404
  respond('{"error":{"code":404,"message":"Not Found"}}')
end

-- Seconds pass before every response: `latency_ms`, and what the body takes at `bytes_per_s`.
function origin.wait(size)
  local wait_s = tonumber(ngx.var.latency_ms) / 1000
  local bytes_per_s = tonumber(ngx.var.bytes_per_s)
  if size and bytes_per_s > 0 then
    wait_s = wait_s + size / bytes_per_s
  end
  if wait_s > 0 then
    ngx.sleep(wait_s)
  end
end

function origin.list(bucket)
  local query = ngx.req.get_uri_args()
  local prefix, last = query.prefix or "", query.endOffset
  local from = query.pageToken and ngx.decode_base64(query.pageToken) or query.startOffset or ""
  local items, place, token = {}, first_from(from > prefix and from or prefix), nil
  local largest = math.min(tonumber(query.maxResults) or LARGEST_PAGE, LARGEST_PAGE)
  while place <= count() do
    local name = name_at(place)
    if name:sub(1, #prefix) ~= prefix or (last and name >= last) then
      break
    elseif #items == largest then
      token = name
      break
    end
    items[#items + 1] = resource(bucket, object_at(place), query.fields ~= nil)
    place = place + 1
  end
  local more = token and ',"nextPageToken":"' .. ngx.encode_base64(token) .. '"' or ""
  respond('{"kind":"storage#objects"' .. more .. ',"items":[' .. table.concat(items, ",") .. "]}")
end

function origin.describe_bucket(bucket)
  respond('{"kind":"storage#bucket","id":"' .. bucket .. '","name":"' .. bucket .. '","metageneration":"1","location":"US",'
    .. '"storageClass":"STANDARD","timeCreated":"' .. UPDATED .. '","updated":"' .. UPDATED .. '"}')
end

function origin.describe(bucket, name)
  local object = of_name[name]
  if object then
    respond(resource(bucket, object, false))
  else
    not_found()
  end
end

function origin.wait_for(name)
  local object = of_name[name]
  if not object then
    return not_found()
  end
  origin.wait(tonumber(object.size))
end

function origin.headers(name)
  local object = of_name[name]
  if object then
    ngx.header["x-goog-hash"] = "crc32c=" .. object.crc32c .. ",md5=" .. object.md5
    ngx.header["x-goog-generation"] = object.generation
    ngx.header["x-goog-metageneration"] = "1"
    ngx.header["x-goog-stored-content-encoding"] = "identity"
    ngx.header["x-goog-stored-content-length"] = object.size
  end
end

function origin.count(kind, sent_bytes)
  local counts = ngx.shared.counts
  counts:incr(kind .. "_requests", 1, 0)
  counts:incr(kind .. "_bytes", sent_bytes, 0)
end

function origin.counts()
  local lines = {}
  for _, key in ipairs(ngx.shared.counts:get_keys(0)) do
    lines[#lines + 1] = '"' .. key .. '":' .. ngx.shared.counts:get(key)
  end
  respond("{" .. table.concat(lines, ",") .. "}")
end

return origin
