"""The words of a task table's record: RECORD_WORDS int32, the fields below, then the arguments of its body.

Apart from `table.py` and `stream.py`, which make tables, so that a runtime can read them without a compiler.
"""

RECORD_WORDS = 32
MAX_WAITS = 2
# Word positions; the C++ and Triton loops are generated from this list.
FIELDS = (
    "body", "first", "last", "step", "layer", "wait0", "target0", "wait1", "target1", "signal",
    "prefetch", "prefetch_size", "stream",
)  # fmt: skip
ARGS = len(FIELDS)  # words ARGS.. are the body's arguments
END = -1  # body of the record after a worker's last
STREAM_PADDING = 16  # entries without bytes behind a worker's weight stream: an executor may look so far ahead
