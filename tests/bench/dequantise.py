"""Write a GGUF file again with every tensor in float32: the unquantised model that its weights stand for.

    python tests/bench/dequantise.py MODEL.gguf OUT.gguf

So a model that only exists quantised can be quantised to other formats and compared with what it was. Keys and
tokenizer are copied, the gguf package decodes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

FILE_TYPE = "general.file_type"


def dequantise(source: Path, target: Path) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", FILE_TYPE):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file with float32 weights")
    parser.add_argument("source", type=Path, help="a GGUF file")
    parser.add_argument("target", type=Path, help="the file to write")
    args = parser.parse_args()
    dequantise(args.source, args.target)


if __name__ == "__main__":
    main()
