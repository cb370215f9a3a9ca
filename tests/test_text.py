"""Captions -> tokens: the small hashed encoder, and Qwen3 cut to the layers that are read."""

from pathlib import Path

import pytest
import torch

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
    ids = tokenizer("<u>a red sofa</u><a><q>", return_tensors="pt").input_ids
    num_pads = 512 - ids.shape[1]
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, num_pads))
    ids = torch.nn.functional.pad(ids, (0, num_pads), value=tokenizer.pad_token_id)
    with torch.no_grad():
        states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.equal(tokens, torch.cat([states[layer] for layer in (9, 18, 27)], dim=-1))


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
