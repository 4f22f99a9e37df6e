"""The converted tokenizer equals sentencepiece, for every model variant that `convert` takes; the rest is refused."""

import functools
import io
import json
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from trol_edge.bundle.protobuf import protobuf_fields
from trol_edge.errors import CheckpointError, ExportError
from trol_edge.export.reference.tokenizer import convert, read_model, verify
from trol_edge.prompt.tokenizer import UNLISTED, Tokenizer

SPECIALS = [f"[UNUSED_TOKEN_{i}]" for i in (143, 144, 145, 146)]
ORDINARY = [*SPECIALS, "\n", "▁▁", "▁▁▁▁", "7", "ka", "<br>"]  # user-defined, most of them no markup
STRINGS_PER_MODEL = 400


def corpus(seed=0, lines=400):
    """Training text with repetitions, several scripts, and digits."""
    rng = random.Random(seed)
    syllables = [
        "ka",
        "to",
        "mi",
        "ru",
        "shin",
        "der",
        "ein",
        "tion",
        "pre",
        "con",
        "ing",
        "ed",
        "qu",
        "世界",
        "你好",
        "机器",
        "人",
        "при",
        "вет",
        "мир",
        "สวัส",
        "ดี",
        "é",
        "ü",
        "ß",
        "12",
        "345",
    ]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 4))) for _ in range(150)]
    return [" ".join(rng.choice(words) for _ in range(rng.randint(3, 12))) for _ in range(lines)]


def train(**options):
    out = io.BytesIO()
    defaults = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": SPECIALS,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, minloglevel=2, num_threads=1, **(defaults | options)
    )
    return out.getvalue()


@functools.cache
def plain():
    """The variant of internlm2."""
    return train()


def edited(data, change):
    """The model after `change(ModelProto)`."""
    model = proto.ModelProto.FromString(data)
    change(model)
    return model.SerializeToString()


def add_piece(model, text, kind, score=0.0):
    model.pieces.add(piece=text, score=score, type=getattr(proto.ModelProto.SentencePiece, kind))


def hand_made(model):
    """What published vocabularies have and training does not make: spare and multi-space pieces."""
    add_piece(model, "▁▁", "NORMAL", -901)
    add_piece(model, "▁▁▁▁", "NORMAL", -902)
    add_piece(model, "\n\n", "NORMAL", -903)  # "\n" is no piece: sentencepiece still merges two of them
    add_piece(model, "ねこ", "NORMAL", -904)
    add_piece(model, "ねこか", "NORMAL", -905)
    add_piece(model, "[spare]", "UNUSED", -906)


VARIANTS = {
    "internlm2": {},
    "dummy-prefix": {"add_dummy_prefix": True},
    "trimmed": {"remove_extra_whitespaces": True},
    "prefix-and-trimmed": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "no-bytes": {"byte_fallback": False, "character_coverage": 0.98, "vocab_size": 250},
    "nmt-nfkc": {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    "nfkc-cf": {"normalization_rule_name": "nfkc_cf"},
    "control": {"control_symbols": ["<ctl>", "<mask>"]},
    "ordinary-user-defined": {"user_defined_symbols": ORDINARY, "add_dummy_prefix": True},
    "ordinary-user-defined-nfkc": {"user_defined_symbols": ORDINARY, "normalization_rule_name": "nmt_nfkc"},
    "split-digits": {"split_digits": True, "split_by_unicode_script": False, "split_by_whitespace": False},
}


@pytest.fixture(scope="module", params=[*VARIANTS, "hand-made", "hand-made-no-bytes"])
def model(request, tmp_path_factory):
    """A checkpoint folder of one variant, with <image> as an added token."""
    folder = tmp_path_factory.mktemp(request.param)
    data = train(**VARIANTS.get(request.param, VARIANTS["no-bytes" if "no-bytes" in request.param else "internlm2"]))
    if "hand-made" in request.param:
        data = edited(data, hand_made)
    return write(folder, data)


def write(folder, data, added=("<image>",)):
    (folder / "tokenizer.model").write_bytes(data)
    size = len(proto.ModelProto.FromString(data).pieces)
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(added)}))
    return folder


def reference(folder):
    """sentencepiece, and what cuts a text before it is asked: content -> id."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    cuts = json.loads((folder / "added_tokens.json").read_text())
    cuts |= {
        processor.id_to_piece(i): i for i in range(len(processor)) if processor.is_control(i) or processor.is_unknown(i)
    }
    return processor, cuts


def random_strings(rng, count, marks):
    alphabets = [
        "ab",
        "aab ",
        "kato mi",
        "  \n\t\r",
        "0123456789 .,",
        "".join(map(chr, range(128))),
        "né̂ü̈ﬁＡ①…½ ́",
        "ねこか世界你好",
        "приветสวัสดี",
        "👩‍👧👍🏽🇰🇷\ufe0f",
        "▁ a",
        "각가ᄀ\u1161\u11a8",
        "\x00\x85\u2028\ufeff\xad ",
        "<0x41>",
        "[]<>|_UNSED",
    ]
    words = [w for line in corpus(1, 40) for w in line.split()]
    for _ in range(count):
        pieces = []
        for _ in range(rng.randint(1, 5)):
            kind = rng.random()
            if kind < 0.4:
                alphabet = rng.choice(alphabets)
                pieces.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12))))
            elif kind < 0.75:
                pieces.append(rng.choice(["", " ", "  "]) + rng.choice(words))
            elif kind < 0.9:
                pieces.append(rng.choice(marks))
            else:
                codes = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(3)]
                pieces.append("".join(map(chr, codes)))
        yield "".join(pieces)


def reference_ids(processor, cuts, text):
    """Cut at the leftmost, longest token again and again: slow and obvious."""
    ids, start, at = [], 0, 0
    while at < len(text):
        here = [token for token in cuts if text.startswith(token, at)]
        if not here:
            at += 1
            continue
        token = max(here, key=len)
        ids += [*processor.encode(text[start:at]), cuts[token]]
        start = at = at + len(token)
    return ids + processor.encode(text[start:])


def test_ids_and_text_equal_sentencepiece(model):
    tokenizer = Tokenizer(convert(model))
    processor, cuts = reference(model)
    marks = [*cuts, *SPECIALS, "<br>", "[spare]"]
    for text in random_strings(random.Random(model.name), STRINGS_PER_MODEL, marks):
        ids = tokenizer.encode(tokenizer.parse(text))
        assert ids == reference_ids(processor, cuts, text), text
        sayable = [i for i in ids if i not in cuts.values()]
        assert tokenizer.decode(sayable) == tokenizer.decode(ids) == processor.decode(sayable), text


def test_literal_text_never_gives_a_special_id(model):
    tokenizer = Tokenizer(convert(model))
    processor, cuts = reference(model)
    special = set(tokenizer.special_tokens.values()) - {processor.unk_id()}
    assert special >= {cuts["<s>"], cuts["</s>"], cuts["<image>"], *map(processor.piece_to_id, SPECIALS)}
    marks = [*cuts, *SPECIALS, "<br>"]
    for text in random_strings(random.Random(model.name), STRINGS_PER_MODEL // 2, marks):
        ids = tokenizer.encode(text)
        assert not special.intersection(ids), text
        assert max(ids, default=0) < UNLISTED
        if not any(mark in text for mark in marks):
            assert ids == processor.encode(text), text


def test_random_ids_decode_as_sentencepiece_does(model):
    tokenizer = Tokenizer(convert(model))
    processor, cuts = reference(model)
    rng = random.Random(model.name)
    byte_ids = [i for i in range(len(processor)) if processor.is_byte(i)] or [0]
    sayable = [i for i in range(len(processor)) if i not in cuts.values()]
    for _ in range(STRINGS_PER_MODEL):
        ids = [rng.choice(byte_ids if rng.random() < 0.5 else sayable) for _ in range(rng.randint(1, 12))]
        ids = [i for i in ids if i != processor.unk_id()]
        assert tokenizer.decode(ids) == processor.decode(ids), ids


def test_verify_passes(model):
    assert verify(convert(model), model) > 500


def test_verify_names_the_first_difference(tmp_path):
    folder = write(tmp_path, plain())
    damaged = json.loads(convert(folder))
    damaged["model"]["merges"].reverse()
    with pytest.raises(ExportError, match=r"disagrees with sentencepiece on '.+': ids \[.+\], expected \["):
        verify(json.dumps(damaged), folder)


def test_verify_finds_a_special_token_that_literal_text_can_give(tmp_path):
    folder = write(tmp_path, edited(plain(), lambda m: add_piece(m, "◆", "CONTROL")))
    with pytest.raises(ExportError, match="'◆' in user text gives the special ids"):
        verify(convert(folder), folder)


def test_a_nul_piece_is_one_id(tmp_path):
    """It equals the authors' sentencepiece. Later releases (0.2.3) give the byte, so `verify` leaves NUL out."""
    folder = write(tmp_path, edited(plain(), lambda m: add_piece(m, "\x00", "NORMAL", -900)))
    tokenizer = Tokenizer(convert(folder))
    assert tokenizer.encode("\x00\x00") == [600, 600]
    assert tokenizer.decode([600]) == "\x00"
    assert verify(convert(folder), folder)


def test_the_model_file_is_read_as_protobuf_reads_it(tmp_path):
    data = edited(train(add_dummy_prefix=True, normalization_rule_name="nmt_nfkc"), hand_made)
    write(tmp_path, data)
    model, want = read_model(tmp_path / "tokenizer.model"), proto.ModelProto.FromString(data)
    assert [(p.text, p.score, p.kind) for p in model.pieces] == [(p.piece, p.score, p.type) for p in want.pieces]
    assert model.byte_fallback is want.trainer_spec.byte_fallback is True
    assert model.charsmap == want.normalizer_spec.precompiled_charsmap
    assert model.add_dummy_prefix and not model.remove_extra_whitespaces
    assert dict(protobuf_fields(b"")) == {}


def test_convert_is_deterministic_and_orders_ids(tmp_path):
    folder = write(tmp_path, plain(), ["<image>", "<video>"])
    assert convert(folder) == convert(folder)
    tokenizer = Tokenizer(convert(folder))
    size = len(reference(folder)[0])
    assert tokenizer.special_tokens["<image>"] == size and tokenizer.special_tokens["<video>"] == size + 1


def test_a_folder_without_tokenizer_gives_none(tmp_path):
    assert convert(tmp_path) is None


def test_extra_tokens_get_the_next_id_unless_they_are_there(tmp_path):
    folder = write(tmp_path, plain(), ["<image>"])
    size = len(reference(folder)[0])
    assert convert(folder, ["<image>"]) == convert(folder)
    text = convert(folder, ["<video>"])
    assert Tokenizer(text).special_tokens["<video>"] == size + 1
    verify(text, folder, ["<video>"])


def test_tokens_of_tokenizer_config_cut_too(tmp_path):
    folder = write(tmp_path, train(add_dummy_prefix=True), [])
    processor, cuts = reference(folder)
    decoder = {processor.piece_to_id(SPECIALS[0]): SPECIALS[0], len(processor): "<image>"}
    entries = {str(i): {"content": content, "lstrip": False, "special": True} for i, content in decoder.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    tokenizer = Tokenizer(convert(folder))
    cuts |= {content: i for i, content in decoder.items()}
    text = f"<s>{SPECIALS[0]}kato{SPECIALS[1]}mi<image> mi"
    assert tokenizer.encode(tokenizer.parse(text)) == reference_ids(processor, cuts, text)
    assert verify(convert(folder), folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "not BPE"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (lambda: plain()[:5000], "cannot be read"),
        (lambda: train(model_type="unigram", vocab_size=400), "its model type is not BPE"),
        (lambda: train(model_type="word", vocab_size=400), "its model type is not BPE"),
        (lambda: edited(train(byte_fallback=False, vocab_size=300), lambda m: m.ClearField("trainer_spec")), "not BPE"),
        (lambda: train(treat_whitespace_as_suffix=True), "it treats whitespace as a suffix"),
        (lambda: edited(plain(), lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False)), "not escape"),
        (lambda: edited(plain(), lambda m: add_piece(m, "zq", "UNUSED")), "'zq' is marked unused"),
    ],
)
def test_an_unusable_model_is_refused_by_name(tmp_path, make, message):
    (tmp_path / "tokenizer.model").write_bytes(make())
    with pytest.raises(CheckpointError, match=message) as error:
        convert(tmp_path)
    assert "tokenizer.model" in str(error.value)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('{"<image>": 3}', r"added_tokens.json: token '<image>' has id 3, .* id 3 is '.+'"),
        ('{"<s>": 600}', r"added_tokens.json: token '<s>' has id 600, .* is id 1"),
        ('{"<image>": 601}', r"the added ids \[601\] .* gap"),
        ('{"<image>": 600, "<b>": 600}', r"the added ids \[600, 600\] .* repeat"),
        ('{"<image>": -1}', "found -1 as an id"),
        ('{"<image>": "600"}', "found '600' as an id"),
        ('{"<image>": true}', "found True as an id"),
        ('{"": 600}', "found a token ''"),
        ('["<image>"]', "expected a JSON object, found list"),
        ('{"<image>": 7', "added_tokens.json: not readable as JSON"),
    ],
)
def test_inconsistent_added_tokens_are_refused(tmp_path, added, message):
    folder = write(tmp_path, plain())
    (folder / "added_tokens.json").write_text(added)
    with pytest.raises(CheckpointError, match=message):
        convert(folder)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"600": {"content": "<image>", "single_word": True}}, "is found as a word only"),
        ({"601": {"content": "<image>"}}, "tokenizer_config.json: token '<image>' has id 601"),
        ({"x": {"content": "<other>"}}, "found 'x' as an id"),
        ({"601": {}}, "found a token None"),
        ([], "not an object of objects"),
        ({"601": "<other>"}, "not an object of objects"),
    ],
)
def test_an_inconsistent_tokenizer_config_is_refused(tmp_path, decoder, message):
    folder = write(tmp_path, plain())
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(CheckpointError, match=message):
        convert(folder)


def test_added_tokens_without_a_model_are_refused(tmp_path):
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model"):
        convert(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a" + b"\x80" * 4 + b"\x04",  # a field of 2**30 bytes
        b"\x0a" + b"\xff" * 100_000,  # a number without end
        b"\x0b" * 100_000,  # groups within groups
        b"\x0a\x05\x0a\x03\xff\xff\xff",  # a piece that is no text
    ],
)
def test_what_a_model_declares_is_bounded(tmp_path, data):
    """Refused by what is there, before sentencepiece reserves what is said."""
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*cannot be read"):
        convert(tmp_path)


def test_a_piece_of_many_characters(tmp_path):
    """Ways to merge one grow with the square of its length."""
    model = proto.ModelProto.FromString(plain())
    model.pieces[-1].piece = "a" * 100_000
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"piece (is too long|has more than 1024)"):
        convert(tmp_path)
