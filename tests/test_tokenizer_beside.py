"""What a file does not say of its tokenizer: what a Hugging Face folder has beside it, and what Meta has in its code."""

import json

import peer_tokenizers as peers
import pytest
from tokenizer_texts import PROSE, texts, train_sentencepiece

from pocketlm import tokenizer
from pocketlm.errors import FileError
from pocketlm.tokenizer.byte_bpe import LETTERS
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS


def row(content, special=True, **more):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": special, **more}  # fmt: skip


@pytest.mark.parametrize("source", ["added_tokens_decoder", "added_tokens.json"])
def test_a_sentencepiece_model_has_the_tokens_that_its_folder_added(source, tmp_path):
    """Many a Llama that was trained further for chats: its markers stand beside the file alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is what is compared with")
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(PROSE.split("\n"), 700, **options))
    alone = tokenizer.load(tmp_path / "tokenizer.model")
    n = alone.n_vocab
    assert (alone.adds_bos, alone.eos_id) == (False, 2)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    config |= {"add_bos_token": True, "legacy": False}
    if source == "added_tokens.json":
        added = {"<|im_end|>": n, "<|im_start|>": n + 1}
        (tmp_path / source).write_text(json.dumps(added))
    else:
        own = {"0": row("<unk>"), "1": row("<s>"), "2": row("</s>")}
        new = [row("<|im_end|>", rstrip=True), row("<|im_start|>", False), row("żółw", False)]
        config[source] = {**own, **{str(n + i): token for i, token in enumerate(new)}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.n_vocab, ours.adds_bos, ours.bos_id, ours.eos_id) == (len(theirs), True, 1, n)
    for text in texts(1000, 7, ["<|im_start|>", "<|im_end|>", "<|im_end|>\n", "<s>", "żółw"]):
        assert ours.encode(text, special=True, bos=True) == theirs(text)["input_ids"], text
    assert tokenizer.from_metadata(tokenizer.to_metadata(ours, ours.n_vocab), "m").encode("<|im_end|>", special=True) == [n]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"added_tokens_decoder": []}, []),
        ({"added_tokens_decoder": {"x": row("<|a|>")}}, ["tokenizer_config.json"]),
        ({"added_tokens_decoder": {"9": {}}}, ["tokenizer_config.json"]),
        ({"added_tokens_decoder": {"9": {"content": 9}}}, ["tokenizer_config.json"]),
        ({"added_tokens_decoder": {"9": 9}}, ["tokenizer_config.json"]),
        ({"added_tokens_decoder": [9]}, ["tokenizer_config.json"]),
        ({"added_tokens_decoder": {"1": row("<s>")}}, ["'<s>' has two ids"]),
        ({"added_tokens_decoder": {"0": row("<|a|>")}}, ["id 0 stands for"]),
        ({"added_tokens_decoder": {"999999": row("<|a|>")}}, ["the id 999999"]),
        ({"added_tokens_decoder": {"9": row("<|a|>", single_word=True)}}, ["single word"]),
        ([], ["tokenizer_config.json"]),
    ],
)
def test_what_was_added_to_a_sentencepiece_model_and_cannot_be_is_refused(config, words, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model = b"".join(b"\n\x05\n\x03" + name for name in (b"<s>", b"abc")) + b"\n\x09\n\x05<unk>\x18\x02\x12\x02\x18\x02"
    (tmp_path / "tokenizer.model").write_bytes(model)
    if words:
        with pytest.raises(FileError, match=".*".join(words)):
            tokenizer.load(tmp_path)
    else:
        assert tokenizer.load(tmp_path).n_vocab == 3


def test_two_files_of_a_qwen_are_cut_as_its_class_cuts_texts(tmp_path):
    """Its pre-tokenizer is not GPT-2's, and nothing in vocab.json and merges.txt says so."""
    transformers = pytest.importorskip("transformers", reason="transformers is what is compared with")
    made = peers.byte_level(PROSE.split("\n"), 800)
    made.model.save(str(tmp_path))
    n = made.get_vocab_size()
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ends = {str(n): row("<|endoftext|>"), str(n + 1): row("<|im_end|>")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": ends}))
    ours, theirs = tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == n + 1
    for text in texts(1000, 8, ["<|im_end|>"]):
        assert ours.encode(text, special=True) == theirs(text)["input_ids"], text


def test_tokens_that_the_folder_calls_special_are_markers(tmp_path):
    """As text an end of turn would be shown, and the markers of a template be read letter by letter."""
    transformers = pytest.importorskip("transformers", reason="transformers is what is compared with")
    vocab = {token: i for i, token in enumerate([*LETTERS, "<s>", "<END>", "<|user|>", "<pad>", "He"])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": ["H e"]}
    file = {"version": "1.0", "pre_tokenizer": level, "decoder": level, "model": model, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": row("<END>")}
    config |= {"additional_special_tokens": ["<|user|>"], "pad_token": "<s>"}
    config["eos_token"]["__type"] = "AddedToken"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<|user|>Hello<END>", "<s>He <END><|user|>"):
        assert ours.encode(text, special=True) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text, special=True)).strip() in ("Hello", "He")
    assert len(ours.encode("<END>")) == 5


def test_metas_own_file_of_llama_3_is_cut_as_llama_3_cuts_texts(tmp_path):
    """It is called tokenizer.model and holds tiktoken ranks, no pattern and no markers."""
    ranks = [bytes([byte]) for byte in range(256)] + [b"123", b"12", b"he", b"LL", b"'L", b"\n\n"]
    ranks += [b"\xff%d" % i for i in range(128000 - len(ranks))]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(peers.rank_lines(ranks))
    ours, pattern = tokenizer.load(tmp_path), PRE_TOKENIZERS["llama-bpe"][0]
    special = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eom_id|>": 128008, "<|eot_id|>": 128009}
    theirs = peers.encoding(path.read_bytes(), pattern, special)
    assert (ours.n_vocab, ours.adds_bos, ours.bos_id, ours.eos_id) == (128256, True, 128000, 128001)
    assert ours.end_ids == {128001, 128008, 128009}
    assert ours.token_id("<|reserved_special_token_245|>") == 128255
    for text in texts(1000, 9, list(special)):
        assert ours.encode(text, special=True) == theirs.encode(text, allowed_special="all"), text
