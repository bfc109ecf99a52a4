"""The reference for `fill.py`: gcloud-aio-storage on uvloop, CONCURRENCY downloads at a time, each body written to a file.

    python bench/bare_loop.py URL FOLDER CONCURRENCY [--tuned]

It checks nothing, retries nothing and keeps no index. `--tuned` keeps malloc from mapping each body, as the daemon does.
Prints JSON for everything after the first tenth of the objects: objects, seconds, CPU seconds.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import aiohttp
import uvloop
from gcloud.aio.storage import Storage

from gcs_prefetchd.shared.malloc import keep_freed_memory
from rig import BUCKET


async def main(url: str, folder: Path, concurrency: int) -> None:
    """List the bucket, then fetch all of it."""
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        storage = Storage(session=session, api_root=url, token=object(), api_is_dev=True)  # type: ignore[arg-type]
        names = await names_of(storage)
        for parent in {(folder / name).parent for name in names}:
            parent.mkdir(parents=True)
        left, marks = iter(names), [(0.0, 0.0)]
        done = 0

        async def work() -> None:
            nonlocal done
            for name in left:
                body = await storage.download(BUCKET, name)
                with (folder / name).open("wb", buffering=0) as file:
                    file.write(body)
                done += 1
                if done == len(names) // 10:
                    marks.append((time.perf_counter(), time.process_time()))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds, cpu_s = time.perf_counter() - marks[-1][0], time.process_time() - marks[-1][1]
        print(json.dumps({"objects": len(names) - len(names) // 10, "seconds": seconds, "cpu_s": cpu_s}))


async def names_of(storage: Storage) -> list[str]:
    """The names of every object in the bucket."""
    names: list[str] = []
    token = ""
    while True:
        page = await storage.list_objects(BUCKET, params={"pageToken": token} if token else {})
        names += [one["name"] for one in page["items"]]
        token = page.get("nextPageToken", "")
        if not token:
            return names


if __name__ == "__main__":
    if "--tuned" in sys.argv:
        keep_freed_memory()
    uvloop.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
