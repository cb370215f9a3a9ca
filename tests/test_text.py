"""Captions -> tokens: the small hashed encoder, and Qwen3 cut to the layers that are read."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from mofo.frozen import Encoders
from mofo.model import text

CAPTIONS = ["a red sofa", "a blue sofa", "sofa red a", "a red sofa and a lamp", ""]
TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if not enable_thinking %}<q>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 36 narrow layers with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3")
    words = ["<pad>", "<unk>", "<u>", "</u>", "<a>", "<q>", *"abcdefghijklmnopqrstuvwxyz "]
    tokens = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("<[^>]+>|."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="left",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=36,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_small_tokens_have_the_promised_shape_and_scale() -> None:
    small = text.load("small")
    tokens = small.encode(CAPTIONS)
    assert tokens.shape == (len(CAPTIONS), small.length, small.channels) == (5, 24, 64)
    torch.testing.assert_close(tokens.square().mean(-1), torch.ones(5, 24))


def test_distinct_captions_have_distinct_small_tokens() -> None:
    tokens = text.load("small").encode(CAPTIONS)
    for i in range(len(CAPTIONS)):
        assert all(not torch.equal(tokens[i], tokens[j]) for j in range(i))


def test_similar_words_are_nearer_than_unrelated_ones() -> None:
    tokens = text.load("small").encode(["sofa sofas tower", "house houses lamp"])[:, :3]
    near = (tokens[:, 0] * tokens[:, 1]).mean(-1)
    far = (tokens[:, 0] * tokens[:, 2]).mean(-1)
    assert (near > far + 0.2).all()


def test_case_and_punctuation_do_not_matter_but_long_captions_are_cut() -> None:
    small = text.load("small")
    plain, shouted = small.encode(["a red sofa", "A red, SOFA!"])
    assert torch.equal(plain, shouted)
    long, longer = small.encode(["word " * 24, "word " * 30])
    assert torch.equal(long, longer)


def test_the_empty_caption_is_padding_only() -> None:
    empty, word = text.load("small").encode(["", "sofa"])
    assert torch.equal(empty, empty[:1].expand(24, -1))
    assert torch.equal(word[1:], empty[1:])


def test_small_tokens_are_the_same_on_every_machine() -> None:
    first = text.load("small").encode(["a"])[0, 0]
    # "<a>" is its only n-gram: the first bits of sha256("<a>"), least significant first.
    assert first[:8].tolist() == [-1, 1, 1, 1, 1, 1, -1, 1]


def test_qwen_tokens_equal_the_hidden_states_of_the_whole_model(qwen_folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    encoder = text.load(qwen_folder)
    assert len(encoder.model.layers) == 27
    tokens = encoder.encode(["a red sofa"])
    assert tokens.shape == (1, encoder.length, encoder.channels) == (1, 512, 96)

    whole = Qwen3ForCausalLM.from_pretrained(qwen_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a red sofa"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert prompt == "<u>a red sofa</u><a><q>"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    num_pads = 512 - ids.shape[1]
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, num_pads))
    ids = torch.nn.functional.pad(ids, (0, num_pads), value=tokenizer.pad_token_id)
    with torch.no_grad():
        states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.equal(tokens, torch.cat([states[layer] for layer in (9, 18, 27)], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quarter_of_the_layers_and_the_head_are_saved(
    qwen_folder: Path, dtype: torch.dtype
) -> None:
    from transformers import Qwen3ForCausalLM

    encoder = text.load(qwen_folder, dtype=dtype)
    promised = encoder.num_bytes
    assert "model" not in vars(encoder)
    assert promised == sum(one.nbytes for one in encoder.model.parameters())
    whole = Qwen3ForCausalLM.from_pretrained(qwen_folder, dtype=dtype)
    layers, above = (
        sum(one.nbytes for one in m.parameters())
        for m in (whole.model.layers, whole.model.layers[27:])
    )
    assert above == layers / 4
    head = sum(one.nbytes for one in (*whole.lm_head.parameters(), *whole.model.norm.parameters()))
    assert sum(one.nbytes for one in whole.parameters()) - promised == above + head


def test_qwen_is_loaded_by_the_first_unknown_caption_and_can_be_freed(qwen_folder: Path) -> None:
    encoder = text.load(qwen_folder, layers=(1, 2))
    assert encoder.channels == 64
    assert "model" not in vars(encoder)
    assert not encoder.knows(["a lamp"])
    before = encoder.encode(["a lamp", ""])
    held = [weakref.ref(one) for one in encoder.model.parameters()]
    assert all(one() is not None for one in held)

    encoder.free()
    assert all(one() is None for one in held)
    assert encoder.knows(["", "a lamp"])
    assert not encoder.knows(["", "a sofa"])
    assert torch.equal(encoder.encode(["", "a lamp"]), before[[1, 0]])
    assert "model" not in vars(encoder)
    assert torch.equal(encoder.encode(["a sofa", "a lamp"])[1], before[0])
    assert "model" in vars(encoder)


def test_encoders_free_and_reload_their_text_encoder(qwen_folder: Path) -> None:
    encoders = Encoders(text=str(qwen_folder), autoencoder="small")
    before = encoders.text(["a lamp"])
    encoders.free_text()
    assert "model" not in vars(encoders.text_encoder)
    assert torch.equal(encoders.text(["a lamp"]), before)
    small = Encoders(text="small", autoencoder="small")
    small.free_text()
    assert small.text(["a lamp"]).shape == (1, 24, 64)


def test_the_text_encoder_alone_may_compute_in_another_dtype(qwen_folder: Path) -> None:
    encoders = Encoders(text=str(qwen_folder), autoencoder="small", text_dtype="bfloat16")
    assert encoders.text(["a lamp"]).dtype == torch.bfloat16
    assert encoders.image(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    with pytest.raises(ValueError, match="text_dtype is 'half'; accepted: float32, bfloat16"):
        Encoders(text="small", autoencoder="small", text_dtype="half")


def test_qwen_is_found_by_its_hub_id(
    qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--Qwen--Qwen3-8B"
    shutil.copytree(qwen_folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    one, other = (text.load(name, layers=(1,)) for name in ("Qwen/Qwen3-8B", qwen_folder))
    assert torch.equal(one.encode(["a"]), other.encode(["a"]))
    with pytest.raises(ValueError, match=r"tokenizer.json.*--text-encoder FOLDER.*HF_HUB_OFFLINE"):
        text.load("Qwen/Qwen3-4B")


def test_no_code_beside_the_weights_is_run(qwen_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen3")
    ran = tmp_path / "ran"
    for name in ("modeling.py", "tokenization.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\nclass Own:\n    pass\n")
    for file, kinds in (
        ("config.json", {"AutoConfig": "modeling.Own", "AutoModel": "modeling.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization.Own", "tokenization.Own"]}),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | {"auto_map": kinds}))
    text.load(folder, layers=(1,)).encode(["a"])
    assert not ran.exists()


def test_weights_that_are_not_safetensors_are_refused(qwen_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen_folder, tmp_path / "qwen3")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\*\.safetensors"):
        text.load(folder, layers=(1,)).encode(["a"])


def test_qwen_captions_are_cached_and_independent_of_their_batch(qwen_folder: Path) -> None:
    encoder = text.load(qwen_folder, layers=(1, 2))
    together = encoder.encode(["a lamp", "", "a lamp"])
    assert torch.equal(together[0], together[2])
    encoder.model.forward = None  # a second pass through the network would now fail
    assert torch.equal(encoder.encode(["", "a lamp"]), together[[1, 0]])


def test_the_cache_of_qwen_captions_is_bounded(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CACHED_CAPTIONS", 2)
    encoder = text.load(qwen_folder, layers=(1,))
    encoder.encode(["a", "b", "c"])
    assert encoder.knows(["a", "b", "c"])  # one call's captions are kept, however many
    encoder.encode(["b", "d"])
    assert list(encoder._cache) == ["b", "d"]


def test_long_captions_are_cut_on_the_right(qwen_folder: Path) -> None:
    encoder = text.load(qwen_folder, layers=(1,))
    long, longer = encoder.encode(["a" * 600, "a" * 700])
    assert torch.equal(long, longer)


def test_a_folder_without_qwen_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='give "small", a Qwen3 folder'):
        text.load(tmp_path)


def test_a_qwen_of_too_few_layers_is_refused(qwen_folder: Path) -> None:
    with pytest.raises(ValueError, match="36 layers; needed is a qwen3 of at least 40"):
        text.load(qwen_folder, layers=(9, 40))
