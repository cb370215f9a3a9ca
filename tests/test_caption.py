"""Captions: an overlay that is the same however it came about; shards stay as they are."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import picture

from mofo.data.caption import OVERLAY, PROMPT, Speaker, caption, read_overlay
from mofo.data.shards import Shards
from mofo.data.write import write

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)
WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "user", *PROMPT.split()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with a vocabulary of 50 words."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llava")
    words = [*WORDS, *(f"w{number}" for number in range(50 - len(WORDS)))]
    tokens = Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    t.LlavaProcessor(
        t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        t.PreTrainedTokenizerFast(
            tokenizer_object=tokens, additional_special_tokens=["<image>"], **names
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    sizes = {"intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(
            hidden_size=16, num_hidden_layers=1, image_size=16, patch_size=8, **sizes
        ),
        text_config=t.LlamaConfig(
            **{**sizes, "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2},
            **{"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "initializer_range": 0.5},
        ),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    t.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 pictures in shards of 3; every third has a caption."""
    samples = (
        sample if k % 3 == 0 else replace(sample, captions=())
        for k, sample in enumerate(map(picture, range(10)))
    )
    write(samples, tmp_path / "set", "pictures", samples_per_shard=3)
    return tmp_path / "set"


def run(folder: Path, model: Path, **changes):
    return caption(folder, model=model, max_new_tokens=6, device="cpu", **changes)


def test_missing_captions_are_written_and_present_ones_left_alone(
    folder: Path, model: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = run(folder, model)
    captions = read_overlay(folder)
    assert list(captions) == [f"picture-{k:04d}" for k in range(10) if k % 3]
    assert written.captions + written.empty == len(captions) == 6
    texts = [text for texts in captions.values() for text in texts]
    assert len(texts) == written.captions > 1
    # not the prompt, and not the same for every image
    assert not any(PROMPT in text for text in texts)
    assert len(set(texts)) > 1
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_captions_do_not_depend_on_the_batch(folder: Path, model: Path, tmp_path: Path) -> None:
    overlays = [tmp_path / f"{size}.jsonl" for size in (1, 4)]
    for size, overlay in zip((1, 4), overlays, strict=True):
        run(folder, model, batch_size=size, overlay=overlay)
    assert overlays[0].read_bytes() == overlays[1].read_bytes()


def test_what_a_kill_left_is_continued_to_the_same_file(folder: Path, model: Path) -> None:
    """A file that is only appended to is, after a kill, a beginning of itself."""
    run(folder, model, batch_size=4)
    overlay = folder / OVERLAY
    whole, captions = overlay.read_bytes(), list(read_overlay(folder).items())
    ends = [k + 1 for k, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 10, ends[0], ends[0] + 5, ends[1], ends[3] - 1, ends[4] + 20, ends[-1]):
        overlay.write_bytes(whole[:cut])
        left = list(read_overlay(folder).items())
        assert left == captions[: len(left)]
        run(folder, model, batch_size=4)
        assert overlay.read_bytes() == whole


def test_half_a_line_is_no_caption(folder: Path, model: Path) -> None:
    run(folder, model)
    captions = read_overlay(folder)
    overlay = folder / OVERLAY
    overlay.write_bytes(overlay.read_bytes()[:-5])
    assert read_overlay(folder) == dict(list(captions.items())[:-1])


def test_damaged_samples_are_skipped_and_named(
    folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = Shards(folder)
    offset, size, _ = shards._indices[1,].rows[1][1]["png"]
    tar = Path(shards.paths[1])
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 255
    tar.write_bytes(data)
    written = run(folder, model)
    assert written.damaged == ["pictures-000001.tar: picture-0004"]
    assert "picture-0004" in caplog.text
    assert list(read_overlay(folder)) == [f"picture-{k:04d}" for k in (1, 2, 5, 7, 8)]


def test_captions_of_another_model_or_prompt_are_not_mixed(folder: Path, model: Path) -> None:
    run(folder, model)
    with pytest.raises(ValueError, match="name another overlay"):
        run(folder, model, prompt="Describe this")


def test_a_model_that_was_not_there_leaves_nothing_in_the_way(folder: Path, model: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        run(folder, folder / "missing")
    assert read_overlay(folder) == {}
    assert run(folder, model).captions > 1


def test_a_set_that_has_all_captions_needs_no_model(tmp_path: Path) -> None:
    write(map(picture, range(3)), tmp_path / "set", "pictures")
    assert run(tmp_path / "set", tmp_path / "missing").captions == 0
    assert not (tmp_path / "set" / OVERLAY).exists()
    assert read_overlay(tmp_path / "set") == {}


def test_a_damaged_line_is_named(folder: Path) -> None:
    (folder / OVERLAY).write_text('{"format": 1, "model": "m"}\n{"key": "a"\n')
    with pytest.raises(ValueError, match=r"line 2 of .*captions.jsonl is damaged"):
        read_overlay(folder)


def test_an_overlay_has_a_place_of_its_own_where_the_set_has_none(folder: Path) -> None:
    with pytest.raises(ValueError, match="say with overlay="):
        run(Path(f"{folder}/*.tar"), Path("missing"))


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Speaker(tmp_path, PROMPT, 4, "cpu")


def test_another_kind_of_model_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    import transformers as t

    for number, config in enumerate(({"model_type": "mofo"}, {}, t.BertConfig().to_dict())):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ValueError, match="is no image-text-to-text model.*give a folder or hub"
        ):
            Speaker(folder, PROMPT, 4, "cpu")


def test_a_model_without_chat_template_is_given_the_mark_of_the_image(
    model: Path, tmp_path: Path
) -> None:
    for path in model.iterdir():
        if "chat_template" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = tmp_path / "processor_config.json"
    rows = json.loads(settings.read_text())
    settings.write_text(json.dumps({k: v for k, v in rows.items() if k != "chat_template"}))
    speak = Speaker(tmp_path, "Describe this image", 4, "cpu")
    assert speak.prompt == "<image>Describe this image"
    assert len(speak([picture(0).image, picture(1).image])) == 2


def test_the_overlay_is_read_without_transformers() -> None:
    code = (
        "import sys, mofo.data.caption as c; c.read_overlay('missing');"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
