"""Text that comes token by token is the text of all tokens, also where a character is several of them."""

import itertools

import numpy as np
import pytest

from hashml.models.tokenization import FolderTokenizer, decode, load_folder_tokenizer

tokenizers = pytest.importorskip("tokenizers")
decoders = tokenizers.decoders

TEXTS = (
    "the cat sat on the mat",
    "你好世界,这是一个很长的中文句子没有空格。" * 2,
    "日本語 and the cat 🙂🙂🙂🙂🙂🙂🙂 the end",
    "  two  spaces  \n\n",
    "é" * 70,
    "x\ufffdy\ufffd",
)


def sentencepiece():
    """As folders of Llama have it: bytes where a character has no token, and a space before the text."""
    words = ["▁", "▁the", "▁cat", "▁and", "at", "▁m", "▁s", "a", "n", "d", "e", "t", "h", "c", "m", "s"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("a", "t"), ("▁", "m"), ("▁", "s")]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def byte_level():
    """As folders of Qwen2 have it, with merges inside characters and across their ends."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*TEXTS, "好世好世好世"] * 3, trainer)
    return made


MADE = {"sentencepiece": sentencepiece, "byte level": byte_level}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_make_up_the_text_wherever_they_begin(kind, text):
    made = MADE[kind]()
    tokenizer = FolderTokenizer(made, None, ())
    ids = tokenizer.encode(text)
    assert decode(tokenizer, ids) == text
    for cut in range(1, len(ids)):
        before = made.decode(ids[:cut])
        if not before.endswith("\ufffd"):  # else half a character was written
            stream = tokenizer.stream(ids[:cut])
            assert before + "".join(map(stream.push, ids[cut:])) + stream.finish() == text


def test_a_character_comes_with_its_last_byte():
    stream = FolderTokenizer(sentencepiece(), None, ()).stream()
    pushed = [stream.push(3 + byte) for byte in "你é".encode()]
    assert pushed == ["", "", "你", "", "é"]


@pytest.mark.parametrize("length", [7, 90, 400])
def test_bytes_that_are_no_text_neither_stay_for_ever_nor_change_what_was_written(length):
    """Where a run of bytes is no UTF-8, the file's decoder makes each of them U+FFFD, and so do pieces of it but for
    a character at the run's beginning that was written before the run broke."""
    made = sentencepiece()
    tokenizer = FolderTokenizer(made, None, ())
    ids = [3 + byte for byte in [*"é".encode(), *[0x80] * length]] + [made.token_to_id("▁the")]
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in ids]
    assert made.decode(ids) == "\ufffd" * (length + 2) + " the"
    found = "".join(pushed)
    assert found.startswith("é\ufffd")
    assert found.endswith("\ufffd the")
    assert set(found[1:-4]) == {"\ufffd"}
    assert abs(len(found) - 6 - length) <= 8 * (length // 50)  # where the neighbourhood is cut, its text is guessed
    silent = [len(list(run)) for quiet, run in itertools.groupby(pushed, key=lambda text: not text) if quiet]
    assert max(silent) <= 8


def test_a_token_costs_a_bounded_number_of_decoded_ones():
    made = sentencepiece()
    asked = []

    class Counting:
        def __getattr__(self, name):
            return getattr(made, name)

        def decode(self, tokens, **options):
            asked.append(len(tokens))
            return made.decode(tokens, **options)

    rng = np.random.default_rng(0)
    for ids in (made.encode("你好世界é🙂 the cat" * 60).ids, rng.integers(3, 259, 1500).tolist(), [1] * 1500):
        asked.clear()
        decode(FolderTokenizer(Counting(), None, ()), ids)
        assert max(asked) <= 64
        assert sum(asked) <= 10 * 64 * len(ids)


def test_truncation_and_padding_of_the_file_are_not_for_prompts(tmp_path):
    made = sentencepiece()
    expected = made.encode("the cat and the cat").ids
    made.enable_truncation(3)
    made.enable_padding(length=12)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_folder_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("the cat and the cat") == expected
    assert len(expected) > 3
    assert tokenizer.encode("") == []
