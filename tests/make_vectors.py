"""Makes `tests/vectors/`: small vocabularies, texts in many scripts, and the ids that the reference libraries give.

    python tests/make_vectors.py            trains the vocabularies that are not there, asks the libraries for all ids
    python tests/make_vectors.py --check    asks again and says where the files differ; exit status 1 if they do

The tests that read them (`test_vectors.py`) need none of these libraries: sentencepiece, tokenizers, tiktoken, and for the
GGUF vocabularies llama-cpp-python and gguf. To make a vocabulary anew, delete its file first.
"""

import argparse
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peer_tokenizers as peers
from peer_tokenizers import Reference
from tokenizer_texts import PROSE, texts, train_sentencepiece

from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS

FOLDER = Path(__file__).with_name("vectors")
ANSWERS = FOLDER / "answers.json.xz"
MARKERS = ["<|im_start|>", "<|endoftext|>", "<sep>", "<|user|>", "<s>", "</s>"]

WRITTEN = [
    "", " ", "  ", "\n", "\n\n\n", "\t", "\r\n", " \n \n  ", "a", " a", "a ", "  a  b   c    ",
    "\u00a0nicht\u00a0trennen\u3000。",
    "The kettle was on, and she'd said it wouldn't be long: they're late, we've waited, I'll go, you'd stay.",
    "HE'S HERE; WE'LL SEE. 'Tis 'quoted' ''twice''. O'Neill's dogs' tails",
    "Numbers: 7, 42, 365, 1024, 10000, 3.14159, 1,234,567.89, 1e-5, 0x7F, 2024-05-17T08:30:00Z, +49 30 123456, ½ ² Ⅷ ٣ ۴",
    "Пора бы уже и чайник поставить, а то гости придут: в 18:30, как и договаривались. Подъезд №5, ёлка, объём!",
    "Çaydanlığı ocağa koydum; İzmir'den gelen ığdırlı konuk IŞIK söndürüp şöyle dedi: ağır ağır çık.",
    "Zaparzyłem herbatę, choć było już późno: źdźbło trawy, żółw, łódź, ćma, ĘĄŚŹŻ i gżegżółka.",
    "水已经烧开了，他说：“再等一会儿吧！”于是我们坐下来喝茶，一共花了三十八元五角。",
    "お湯が沸いたら、お茶を入れましょう。カタカナとｶﾀｶﾅ、ﾊﾟ。",
    "물이 끓으면 차를 마시자. 한글 자모: 한",
    "Το νερό έβρασε· ας πιούμε τσάι. ΌΧΙ ΑΚΌΜΑ; ναΐ",
    "המים רותחים, בואו נשתה תה. שָׁלוֹם",
    "الماء يغلي، لنشرب الشاي. مُحَمَّد ١٢٣",
    "पानी उबल गया, चाय पी लें। क्षत्रिय ज़रूर",
    "น้ำเดือดแล้ว มาดื่มชากัน กำ",
    "Nước sôi rồi, uống trà thôi. Đường ở Huế",
    "Tee 🍵 ist fertig 😀😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇵🇱🇹🇷 ❤️ ☕️ #️⃣ 🦙",
    "e\u0301 é a\u0308\u0323 a\u0323\u0308 Å Å ﬁ ﬀ ① ㎏ ｆｕｌｌ　ｗｉｄｔｈ ﷺ ǆ ẛ̣",
    "n\u0303o\u0302\u0301\u0327 Z\u0351\u036b\u0343\u036a\u0302a\u034d\u033cl\u0321\u034ago \u20dd \u0301start",
    "zero\u200bwidth\u200djoin\u200cner \ufeffbom soft\u00adhyphen \u2028line\u2029paragraph \u202ertl\u202c \u2060",
    "\x00\x01\x02\x07\x08\x0b\x0c\x0e\x1b[31mred\x1b[0m\x7f\x80\x85\x9f",
    "def pour(cups: int = 2) -> list[str]:\n    \"\"\"Tea.\"\"\"\n    return [f\"{i:02d}\" for i in range(cups)]  # done\n",
    "for (let i = 0; i < n; ++i) {\n\t\tif (!a[i] && b !== null) { x += y ** 2; }\n\t}\n\n\n// end\r\n\r\n",
    "#include <stdio.h>\nint main(void){return printf(\"%d\\n\",~0u>>1)&&!0;}",
    "SELECT name, count(*) FROM tea WHERE price >= 1.50 AND kind <> 'green' GROUP BY 1;\n--\n",
    "<p class=\"a b\">&amp;&nbsp;<br/></p> https://example.org/a?b=c&d=%20#e user@example.org C:\\Temp\\x.txt ../a/./b",
    "| a | b |\n|---|:-:|\n| **1** | `2` |\n\n- [ ] one\n- [x] two\n\n```py\nx\n```\n> quote\n",
    "{\"a\": [1, -2.5e10, true, null], \"b\\u00e9\": \"\\n\"}",
    "....,,,,;;;;!!!!????----____====****~~~~^^^^$$$$@@@@((((]]]]{{}}||||\\\\//",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "                                                  x",
    "hahahahahahahahahahaha nononononono lalalalalalala 1111111111111111 =================================== ─────────",
    "▁under▁▁score ▁ ▁▁▁ Ġbyte Ċ letters Ã© <0x0A> <0x41><0xFF> <unk>",
    "camelCaseWordsAndHTTPServerNames snake_case_names kebab-case-names SCREAMING_SNAKE x86_64 v1.2.3-rc4 β2",
    "𝕬𝖑𝖑 𝓶𝓪𝓽𝓱 𝟘𝟙𝟚 𐍈 𒀀 𓂀 \U00010ffd \U000e0041 \U0010fffd 丽 \ufffd",
    "<|im_start|>user\nTea or coffee?<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|endoftext|>", "a<|endoftext|>b",
    "<|im_start|", "<<|im_start|>>", "<|im_start|><|user|>  \n hello <sep> there  <|user|>x", "  <|user|>  ",
    "<sep><sep> <sep>a<sep>",
    "<s>A</s>", "<s> A </s>\n<s>", " <s>", "ab<sep>3▁▁ello<sep>", "<|user|>\u3000wide \u00a0<|user|>\u2003",
]  # fmt: skip
LINES = PROSE.split("\n") * 4 + [text for text in WRITTEN if "\0" not in text and "\x85" not in text]


class Kind(NamedTuple):
    """A kind of vocabulary: how its file is made, how its library opens it, and what `tokenizer.load` must be told."""

    make: Callable[[Path, dict[str, Any]], None]
    open: Callable[[Path, dict[str, Any]], Reference]


# ── sentencepiece ────────────────────────────────────────────────────────────────────────────────────────────────────


def _make_sentencepiece(path: Path, options: dict[str, Any]) -> None:
    model = train_sentencepiece(LINES, 800, **({"character_coverage": 0.98} | options))
    path.write_bytes(lzma.compress(model, preset=9) if path.suffix == ".xz" else model)


def _open_sentencepiece(path: Path, options: dict[str, Any]) -> Reference:
    return peers.asked_of_sentencepiece(lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes())


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _make_tokenizers(path: Path, options: dict[str, Any]) -> None:
    import tokenizers

    if options["pre"] == "metaspace":
        made = peers.metaspace(LINES, "first", vocab_size=600, limit_alphabet=260)
    else:
        normalizer = tokenizers.normalizers.NFC() if options["pre"] == "qwen2" else None
        made = peers.byte_level(LINES, 600, options["pre"], MARKERS[:2], normalizer)
        add_markers(made)
    text = json.dumps(json.loads(made.to_str()), ensure_ascii=False, separators=(",", ":"))
    path.write_text(text + "\n", "utf-8", newline="\n")


def add_markers(made: Any) -> None:
    """One that is read where it stands, one that takes the white space around it along."""
    from tokenizers import AddedToken

    made.add_tokens([AddedToken("<sep>", normalized=False)])
    made.add_tokens([AddedToken("<|user|>", lstrip=True, rstrip=True, normalized=False)])


def _open_tokenizers(path: Path, options: dict[str, Any]) -> Reference:
    import tokenizers

    return peers.asked_of_tokenizers(tokenizers.Tokenizer.from_str(path.read_text("utf-8")))


# ── tiktoken ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _make_tiktoken(path: Path, options: dict[str, Any]) -> None:
    path.write_bytes(peers.trained_ranks("\n".join(LINES), 600, PRE_TOKENIZERS[options["pattern"]][0]))


def _open_tiktoken(path: Path, options: dict[str, Any]) -> Reference:
    pattern = PRE_TOKENIZERS[options["pattern"]][0]
    return peers.asked_of_tiktoken(peers.encoding(path.read_bytes(), pattern, options["special_tokens"]))


# ── GGUF, as llama.cpp reads it ──────────────────────────────────────────────────────────────────────────────────────


def _make_gguf(path: Path, options: dict[str, Any]) -> None:
    """The tokens of one of the vocabularies above, written by the gguf package: byte-level, or SentencePiece's pieces."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(options.get("name", "test"))
    writer.add_tokenizer_model(options["model"])
    if options["model"] == "gpt2":
        model = json.loads((FOLDER / f"{options['of']}").read_text("utf-8"))
        vocabulary = model["model"]["vocab"] | {token["content"]: token["id"] for token in model["added_tokens"]}
        added = {token["content"]: 3 if token["special"] else 4 for token in model["added_tokens"]}
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        writer.add_tokenizer_pre(options["pre"])
        writer.add_token_list(tokens)
        writer.add_token_types([added.get(token, 1) for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in model["model"]["merges"]])
        writer.add_eos_token_id(vocabulary["<|endoftext|>"])
        writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    else:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / options["of"]))
        every = range(pieces.vocab_size())
        writer.add_tokenizer_pre("default")
        writer.add_token_list([pieces.id_to_piece(i) for i in every])
        writer.add_token_scores([pieces.get_score(i) for i in every])
        kinds = [(pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_unused, 5), (pieces.is_byte, 6)]
        kinds.append((lambda i: pieces.id_to_piece(i) in options.get("user_defined", ()), 4))
        writer.add_token_types([next((number for test, number in kinds if test(i)), 1) for i in every])
        writer.add_bos_token_id(pieces.bos_id())
        writer.add_eos_token_id(pieces.eos_id())
        writer.add_unk_token_id(pieces.unk_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# ── the set ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SENTENCEPIECE = Kind(_make_sentencepiece, _open_sentencepiece)
TOKENIZERS = Kind(_make_tokenizers, _open_tokenizers)
TIKTOKEN = Kind(_make_tiktoken, _open_tiktoken)
GGUF = Kind(_make_gguf, lambda path, options: peers.asked_of_llama_cpp(path))
SYMBOLS = ["<sep>", "<|user|>", "3", "▁▁", "ab", "ello"]

VOCABULARIES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "sentencepiece-bytes.model": (SENTENCEPIECE, {"byte_fallback": True, "normalization_rule_name": "identity"}),
    "sentencepiece-symbols.model": (
        SENTENCEPIECE,
        {
            "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
            "remove_extra_whitespaces": False, "split_digits": True, "user_defined_symbols": [*SYMBOLS, "\n"],
            "control_symbols": ["<|endoftext|>", "<|end|>"],
        },
    ),
    "sentencepiece-nfkc.model.xz": (SENTENCEPIECE, {"character_coverage": 0.98, "user_defined_symbols": SYMBOLS}),
    "tokenizers-gpt-2.json": (TOKENIZERS, {"pre": "gpt-2"}),
    "tokenizers-smollm.json": (TOKENIZERS, {"pre": "smollm"}),
    "tokenizers-llama-bpe.json": (TOKENIZERS, {"pre": "llama-bpe"}),
    "tokenizers-qwen2.json": (TOKENIZERS, {"pre": "qwen2"}),
    "tokenizers-metaspace.json": (TOKENIZERS, {"pre": "metaspace"}),
    "tiktoken-gpt-2.tiktoken": (TIKTOKEN, {"pattern": "gpt-2", "special_tokens": {"<|endoftext|>": 600, "<|im_start|>": 601}}),
    "tiktoken-llama-bpe.tiktoken": (TIKTOKEN, {"pattern": "llama-bpe", "special_tokens": {"<|endoftext|>": 600}}),
    "gguf-gpt-2.gguf": (GGUF, {"model": "gpt2", "pre": "gpt-2", "of": "tokenizers-gpt-2.json"}),
    "gguf-starcoder.gguf": (GGUF, {"model": "gpt2", "pre": "starcoder", "of": "tokenizers-smollm.json"}),
    "gguf-llama-bpe.gguf": (GGUF, {"model": "gpt2", "pre": "llama-bpe", "of": "tokenizers-llama-bpe.json"}),
    "gguf-qwen2.gguf": (GGUF, {"model": "gpt2", "pre": "qwen2", "of": "tokenizers-qwen2.json"}),
    "gguf-default.gguf": (GGUF, {"model": "gpt2", "pre": "default", "of": "tokenizers-gpt-2.json"}),
    "gguf-llama.gguf": (GGUF, {"model": "llama", "of": "sentencepiece-bytes.model"}),
    "gguf-phi-3.gguf": (
        GGUF, {"model": "llama", "of": "sentencepiece-symbols.model", "name": "Phi-3", "user_defined": SYMBOLS}
    ),
}  # fmt: skip


def apart(name: str, text: str) -> bool:
    """Whether we mean to differ: llama.cpp strips ASCII white space after markers, Phi-3's own tokenizer all of it."""
    return name == "gguf-phi-3.gguf" and "<|user|>" in text and any(space in text for space in "\x85\xa0\u2003\u3000")


def answers(name: str, some: list[str]) -> dict[str, Any]:
    """What the library says of every text: `plain` ids as "1 2 3"; by the text's number `special`, the ids with markers read,
    where they are others, and `decoded`, where it is not the text itself; both None where the library cannot say.
    `load`: what `tokenizer.load` must be told besides the path."""
    kind, options = VOCABULARIES[name]
    theirs = kind.open(FOLDER / name, options)
    plain = theirs.encode(some, False)
    special = theirs.encode(some, True) if True in theirs.specials else []
    found: dict[str, Any] = {"load": options if "special_tokens" in options else {}}
    found["plain"] = [" ".join(map(str, ids)) for ids in plain]
    found["special"] = found["decoded"] = None
    if special:
        pairs = enumerate(zip(plain, special, strict=True))
        found["special"] = {str(i): " ".join(map(str, b)) for i, (a, b) in pairs if a != b}
    if theirs.decode is not None:
        decoded = [theirs.decode(ids) for ids in plain]
        found["decoded"] = {str(i): text for i, text in enumerate(decoded) if text != some[i]}
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    args = options.parse_args()
    FOLDER.mkdir(exist_ok=True)
    kept = json.loads(lzma.decompress(ANSWERS.read_bytes())) if args.check else {"texts": WRITTEN + texts(100, 7, MARKERS)[2:]}
    now = {"texts": kept["texts"], "answers": {}}
    for name, (kind, how) in VOCABULARIES.items():
        if not (FOLDER / name).exists():
            kind.make(FOLDER / name, how)
        now["answers"][name] = answers(name, kept["texts"])
    if not args.check:
        ANSWERS.write_bytes(lzma.compress(json.dumps(now, ensure_ascii=False).encode(), preset=9))
        return 0
    differing = [name for name in VOCABULARIES if now["answers"][name] != kept["answers"].get(name)]
    print("\n".join(f"{name}: its library says something else now" for name in differing))
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
