"""The tokenizers of two real models, against what llama.cpp made of the same files."""

import pytest

from onelaunch.models.fetch import fetch
from onelaunch.models.open import open_checkpoint
from onelaunch.runtime.tokenizer import Tokenizer

GOLDEN = [
    # text, SmolLM2 ids, Gemma 3 ids: as llama.cpp's /tokenize gave them for the same files
    ("Hello world", [19556, 905], [9259, 1902]),
    (" leading", [2899], [5830]),
    ("a  b   c    d", [81, 216, 278, 256, 265, 333, 287], [236746, 138, 236763, 139, 236755, 140, 236753]),
    ("\n\n\nx\n", [1116, 198, 104, 198], [109, 236781, 107]),
    ("\t\tif x:\n\t\t\treturn 1", [197, 197, 342, 1792, 42, 3558, 197, 5406, 216, 33], [255969, 584,
     1123, 236787, 107, 255970, 2060, 236743, 236770]),
    ("1234567 12.5e10 \xbd \xb2", [33, 34, 35, 36, 37, 38, 39, 216, 33, 34, 30, 37, 85, 33, 32, 216,
     16738, 216, 19133], [236770, 236778, 236800, 236812, 236810, 236825, 236832, 236743, 236770,
     236778, 236761, 236810, 236744, 236770, 236771, 47041, 145191]),
    ("na\xefve caf\xe9 e\u0301 \xfcber Stra\xdfe", [3546, 46494, 37366, 297, 151, 219, 5549, 137, 593,
     19144, 34878, 85], [1789, 238527, 560, 33443, 545, 238288, 8046, 80176]),
    ("\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f1e9\U0001f1ea", [10813,
     38887, 10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 321, 231, 10813, 235,
     116, 10813, 225, 119, 10813, 225, 120], [240731, 243767, 237243, 243767, 237243, 244814, 237243,
     244990, 246841, 245562]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198], [236820, 236909, 548, 236779,
     3041, 111038, 2364, 107, 2202, 236820, 236909, 548, 236779, 643, 111038, 107]),
    ("<start_of_turn>user\nhi<end_of_turn>\n<bos><eos>", [44, 3738, 79, 1714, 79, 20589, 46, 4093, 198,
     6004, 44, 486, 79, 1714, 79, 20589, 46, 198, 44, 34761, 21198, 85, 395, 46], [105, 2364, 107, 2202,
     106, 107, 2, 1]),
    ("<div><b>bold</b></div>", [44, 10014, 21198, 82, 46, 30471, 9617, 82, 29299, 10014, 46], [224, 200,
     15640, 209, 235]),
    (" the the the  the   the\n  the", [260, 260, 260, 216, 260, 256, 260, 3805, 260],
     [506, 506, 506, 138, 1437, 139, 1437, 107, 138, 1437]),
    ("\xa0nbsp\u2003em\u200bzw", [15442, 94, 32093, 321, 221, 391, 321, 229, 106, 103], [432, 398,
     11539, 464, 366, 369, 581, 237141, 26245]),
    ("aaaaaaaaaaaaa", [46880, 46880, 46880, 81], [128820, 50354, 236746]),
    ("=======================", [6414, 2031, 28733], [6977, 120697]),
    ("\ufffd\ufeff", [24211, 186, 136, 140], [238479, 237922]),
]  # fmt: skip


@pytest.fixture(scope="module", params=["smollm2-135m-instruct", "gemma3-270m"])
def real(request, tmp_path_factory) -> tuple[int, Tokenizer]:
    checkpoint = open_checkpoint(fetch(request.param))
    assert checkpoint.tokenizer is not None
    directory = tmp_path_factory.mktemp("tokenizer")
    checkpoint.tokenizer().write(directory)
    return 1 + (request.param == "gemma3-270m"), Tokenizer.load(directory)


@pytest.mark.weights
def test_real_vocabularies_tokenize_as_llama_cpp(real):
    column, tokenizer = real
    for row in GOLDEN:
        assert tokenizer.encode(row[0], bos=False) == row[column], row[0]
        assert tokenizer.decode(row[column], special=True) == row[0]


@pytest.mark.weights
def test_real_vocabularies_stream_what_they_decode(real):
    _, tokenizer = real
    for text in (row[0] for row in GOLDEN):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids)
        assert "\ufffd" in text or "\ufffd" not in "".join(parts)


@pytest.mark.weights
def test_real_chat_and_begin_token(real):
    column, tokenizer = real
    if column == 1:
        assert tokenizer.encode("a") == [81]
        prompt = tokenizer.chat([{"role": "user", "content": "hi"}])
        assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.encode(prompt)[0] == 1
    else:
        assert tokenizer.encode("a") == [2, 236746]
        assert not tokenizer.has_chat_template
