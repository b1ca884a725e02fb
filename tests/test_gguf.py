"""GGUF files: values against loops and against transformers, tokenizers, and everything that is refused."""

import numpy as np
import pytest
import transformers
from made_gguf import NAME, TOKENS, Type, write

from fslora_jax import hub
from fslora_jax.data.gguf import gguf_tokenizer
from fslora_jax.data.tokens import load_tokenizer
from fslora_jax.errors import UserError
from fslora_jax.gguf import read_gguf
from fslora_jax.models.weights import open_folder

TEXTS = ["hello world", "he said 12,345 or 9 ½", "<|start|>hello<user> wor<|end|>", "naïve 北京\t\n x"]


def whole(tensor):
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / NAME).parent


@pytest.fixture(scope="module")
def hf(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME)


def slow_q8_0(raw):
    for block in raw.reshape(-1, 34):
        scale = np.frombuffer(block[:2].tobytes(), np.float16)[0]
        yield from (np.float32(scale) * np.float32(q) for q in block[2:].view(np.int8))


def slow_q4_1(raw):
    for block in raw.reshape(-1, 20):
        scale, least = (np.float32(x) for x in np.frombuffer(block[:4].tobytes(), np.float16))
        for shift in (0, 4):
            yield from (scale * np.float32((byte >> shift) & 15) + least for byte in block[4:])


@pytest.mark.parametrize(("kind", "slow"), [(Type.Q8_0, slow_q8_0), (Type.Q4_1, slow_q4_1)])
def test_values_are_those_of_a_loop_over_the_bytes(tmp_path, kind, slow):
    path = write(tmp_path / NAME, kinds=(kind,))
    stored = read_gguf(path).tensors["blk.1.ffn_down.weight"]
    raw = np.fromfile(
        path,
        np.uint8,
        int(stored.shape[0] * stored.shape[1] * {"Q8_0": 34, "Q4_1": 20}[kind.name] / 32),
        offset=stored.offset,
    )
    expected = np.array(list(slow(raw)), np.float32).reshape(stored.shape)
    np.testing.assert_array_equal(stored.read(slice(None)), expected)
    np.testing.assert_array_equal(stored.read(slice(3, 7)), expected[3:7])


def test_every_tensor_and_number_is_what_transformers_reads(folder, hf):
    config, checkpoint = open_folder(folder)
    expected = {name: value.numpy() for name, value in hf.state_dict().items() if name != "lm_head.weight"}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(whole(tensor), expected[name], err_msg=name)
    said = hf.config.to_dict() | hf.config.rope_parameters
    assert {name: said[name] for name in config} == config


def test_rows_and_columns_are_read_apart(folder):
    tensor = open_folder(folder)[1].tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(tensor.read((slice(5, 40), slice(7, 9))), whole(tensor)[5:40, 7:9])


def test_an_output_matrix_unties_the_embeddings(tmp_path):
    output = np.ones((len(TOKENS), 64), np.float32)
    config, checkpoint = open_folder(write(tmp_path / NAME, extra={"output.weight": output}).parent)
    assert config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(whole(checkpoint.tensors["lm_head.weight"]), output)


def test_tokens_are_those_of_transformers(folder):
    """It cuts only as GPT-2 does, so it stands beside the file's own way where no digit is."""
    tokenizer = load_tokenizer(folder)
    expected = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME)
    texts = [text for text in TEXTS if not any(c.isnumeric() for c in text)]
    assert [tokenizer.encode(text).ids for text in texts] == expected(texts)["input_ids"]
    assert [tokenizer.decode(tokenizer.encode(t).ids, skip_special_tokens=False) for t in TEXTS] == TEXTS


def test_digits_stay_apart_only_where_the_file_says_so(folder, tmp_path):
    assert load_tokenizer(folder).encode("he 12").tokens == ["he", "Ġ", "1", "2"]
    other = load_tokenizer(write(tmp_path / NAME, split="gpt-2").parent)
    assert other.encode("he 12").tokens == ["he", "Ġ", "12"]


def test_special_tokens_and_the_begin_of_a_text(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / NAME, bos=True).parent)
    assert tokenizer.encode("he").tokens == ["<|start|>", "he"]
    pair = tokenizer.encode("he", "ll")
    assert (pair.tokens, pair.type_ids) == (["<|start|>", "he", "<|start|>", "ll"], [0, 0, 1, 1])
    assert tokenizer.decode([0, 2, 3], skip_special_tokens=True).startswith("<user>")


def test_a_tokenizer_beside_the_file_comes_first(tmp_path):
    folder = write(tmp_path / NAME, split="qwen2").parent
    with pytest.raises(UserError, match=r"'gpt2' with 'qwen2'.* put the model's tokenizer\.json beside it"):
        load_tokenizer(folder)
    other = write(tmp_path / "other.gguf")
    gguf_tokenizer(other).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(folder).encode("he 12").tokens == ["he", "Ġ", "1", "2"]


def error(path, **changes):
    with pytest.raises(UserError) as caught:
        open_folder(write(path / NAME, **changes).parent)
    assert str(path / NAME) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture": "qwen2"}, "its architecture is 'qwen2'; only 'llama'"),
        ({"kinds": (Type.Q4_0,)}, "'token_embd.weight' is of type Q4_0; expected one of ['F32',"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn', which is not supp"),
        ({"metadata": {"expert_count": 8}}, "llama.expert_count is 8"),
        ({"metadata": {"block_count": None}}, "llama.block_count is missing"),
        ({"metadata": {"rope.dimension_count": 8}}, "llama.rope.dimension_count is 8; expected that of a head, 16"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path, changes, expected):
    assert expected in error(tmp_path, **changes)


def test_k_quants_are_named(tmp_path):
    path = write(tmp_path / NAME)
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    content[at] = 12
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"'blk\.0\.attn_q\.weight' is of type Q4_K; expected one of"):
        read_gguf(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 3000, -40])
def test_a_file_that_is_cut_off_is_damaged(tmp_path, keep):
    path = write(tmp_path / NAME)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged GGUF file"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [(0, b"GGML", "does not begin with GGUF"), (4, b"\2", "version 2; expected 3"), (23, b"\x7f", "damaged")],
)
def test_a_changed_header_is_refused(tmp_path, at, value, expected):
    path = write(tmp_path / NAME)
    content = path.read_bytes()
    path.write_bytes(content[:at] + value + content[at + len(value) :])
    with pytest.raises(UserError, match=expected):
        read_gguf(path)


def test_a_folder_of_one_file_is_a_model(folder, tmp_path):
    assert hub.resolve_model(str(folder)) == folder
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name)
    with pytest.raises(UserError, match=r"found \['a\.gguf', 'b\.gguf'\]; expected one"):
        hub.resolve_model(str(tmp_path))


def test_the_packaged_smollm_is_whole(smollm):
    config, checkpoint = open_folder(smollm)
    assert (config["num_hidden_layers"], config["vocab_size"]) == (30, 49152)
    assert len(checkpoint.tensors) == 30 * 9 + 2
    template = read_gguf(next(smollm.glob("*.gguf"))).metadata["tokenizer.chat_template"]
    assert template.startswith("{% for message in messages %}")
    assert load_tokenizer(smollm).encode("<|im_start|>I have 12").tokens[:5] == [
        "<|im_start|>",
        "I",
        "Ġhave",
        "Ġ",
        "1",
    ]
