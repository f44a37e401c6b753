"""llama2.c's `tokenizer.bin`: SentencePiece BPE with its scores, a `Tokenizer` out.

Length of the longest token, then for each token its score (float32), the length of its text and the text, in which a space
stands for ▁. The file does not say how many tokens there are; it ends after the last.
"""

import struct

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import BYTE, CONTROL, NORMAL, UNKNOWN, Tokenizer, make_vocabulary
from pocketlm.tokenizer.sentencepiece import SPACE, UNKNOWN_TEXT, Options
from pocketlm.tokenizer.sentencepiece_bpe import SentencePieceBPE, score_table

_MARKERS = {"\n<s>\n": "<s>", "\n</s>\n": "</s>"}
_LONGEST = 1 << 16  # bytes of a token


def looks_like(data: bytes) -> bool:
    """Whether the file begins with a length, as no other tokenizer does."""
    return len(data) > 12 and data[2:4] == b"\0\0" and data[:2] != b"\0\0"


def read(path: object, data: bytes) -> Tokenizer:
    """Raises FileError for a file that is cut short or is none."""
    tokens, scores, at = [], [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at) if at + 8 <= len(data) else (0.0, 0)
        if not 0 < length <= min(_LONGEST, len(data) - at - 8):
            raise FileError(path, f"is no tokenizer.bin of llama2.c: token {len(tokens)} does not fit into the file")
        try:
            text = data[at + 8 : at + 8 + length].decode()
        except UnicodeDecodeError:
            raise FileError(path, f"is no tokenizer.bin of llama2.c: token {len(tokens)} is not UTF-8") from None
        tokens.append(_MARKERS.get(text) or text.replace(" ", SPACE))
        scores.append(score)
        at += 8 + length
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **{f"<0x{byte:02X}>": BYTE for byte in range(256)}}
    types = bytes(kinds.get(token, NORMAL) for token in tokens)
    ids = {token: i for i, token in enumerate(tokens) if token in kinds}
    vocabulary = make_vocabulary(
        path, tokens, types, bos_id=ids.get("<s>"), eos_id=ids.get("</s>"), unk_id=ids.get("<unk>"), adds_bos=True
    )
    options = Options(prefix="always", symbols_in_text=True, byte_fallback=BYTE in types, unknown_text=UNKNOWN_TEXT)
    return SentencePieceBPE(path, vocabulary, score_table(path, vocabulary, scores), options)
