"""Object names for property tests."""

from hypothesis import strategies as st

BUCKET = "pictures"

# Names that GCS allows, with difficult ones more often than by chance.
_characters = st.characters(exclude_categories=["Cs"])
_awkward = st.sampled_from(
    ["", ".", "..", "%", "%e", "%f", "%d", "%h", "%2E", "\n", "\x00", "a.jpg", "a", "d.d", ".jpg", "x" * 300]
)
_segments = st.one_of(_awkward, st.text(_characters, max_size=12), st.text(st.sampled_from("%edfhEDFH25.aA"), max_size=6))
object_names = (
    st.one_of(st.lists(_segments, min_size=1, max_size=6).map("/".join), st.text(_characters, min_size=1, max_size=1024))
    .map(lambda name: name.encode()[:1024].decode(errors="ignore"))
    .filter(bool)
)
