"""Conversations with pictures: the ids and the answers of transformers, whatever else the engine has to do."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lite_llm import SamplingParams
from lite_llm.engine.request import Tiles
from lite_llm.errors import ContextExceeded, SourceProblem, UsageError
from lite_llm.llm import DEMO, LLM
from lite_llm.models import tiling
from lite_llm.prompts import Encoded, Reader
from lite_llm.text import processor
from lite_llm.text.decoders import DecoderEnded
from lite_llm.text.fetch import Fetcher
from tests.close import DEVICE, exact_float32
from tests.llm.conftest import joined, params
from tests.llm.llava import Theirs, ask, make, noise

OPTIONS = dict(device=DEVICE, dtype="float32", kv_tokens=400, max_requests=4, step_tokens=16)
SHAPES = [(40, 30), (24, 24), (17, 90), (300, 41)]


@pytest.fixture(autouse=True)
def exact():
    with exact_float32():
        yield


@pytest.fixture(scope="module", params=["1.5", "next"])
def both(request, tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("llava") / "tiny", request.param == "next")
    with LLM(folder, **OPTIONS) as llm:
        yield llm, Theirs(folder, DEVICE)


@pytest.fixture
def llm(both):
    llm, _ = both
    scheduler, encoder = llm.engine.scheduler, llm.engine.runner.encoder
    yield llm
    scheduler.check()
    assert llm.engine.idle and not llm._streams and scheduler.prefix.protected == 0
    scheduler.slots.free(scheduler.prefix.evict(scheduler.capacity))
    encoder._kept.clear()


@pytest.fixture
def theirs(both):
    return both[1]


@pytest.fixture
def encoded(llm, monkeypatch):
    """How many tiles each call of the tower got."""
    encoder, calls = llm.engine.runner.encoder, []
    run = encoder._run
    monkeypatch.setattr(encoder, "_run", lambda pixels: calls.append(len(pixels)) or run(pixels))
    return calls


def tiles_of(llm: LLM, *images: Image.Image) -> int:
    return sum(tiling.tiles(llm.cfg.vision, image.size[::-1]) for image in images)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_answers_are_those_of_transformers(llm, theirs, count, encoded):
    images = [noise(*size) for size in SHAPES[:count]]
    messages = [ask("Hello, what is this?", *images)]
    want = theirs.answer(messages)
    out = llm.chat(messages, params(max_tokens=12))
    assert (out.prompt_ids, out.token_ids) == want
    assert out.usage.prompt_tokens == len(want[0]) == len(llm.encode(messages)) and max(out.prompt_ids) < llm.cfg.vocab
    assert sum(encoded) == tiles_of(llm, *images)
    other = theirs.answer([ask("Hello, what is this?", *images[1:], noise(50, 50, 1))])
    assert other[1] != want[1], "the answer does not depend on the pictures"


def test_a_second_question_computes_only_what_is_new(llm, theirs, encoded):
    image, later = noise(40, 30), noise(61, 60)
    messages = [ask("Hello", image)]
    first = llm.chat(messages, params(max_tokens=8))
    done = len(encoded)
    messages += [{"role": "assistant", "content": first.text}, ask("And now?")]
    second = llm.chat(messages, params(max_tokens=8))
    assert (second.prompt_ids, second.token_ids) == theirs.answer(messages, 8)
    assert second.usage.cached_tokens >= len(first.prompt_ids) - 3 and len(encoded) == done
    messages += [{"role": "assistant", "content": second.text}, ask("Compare it with this one", later)]
    third = llm.chat(messages, params(max_tokens=8))
    assert (third.prompt_ids, third.token_ids) == theirs.answer(messages, 8)
    assert third.usage.cached_tokens >= len(second.prompt_ids) - 3
    assert sum(encoded[done:]) == tiles_of(llm, later)


def test_swapped_pictures_and_the_same_bytes_in_another_shape_get_answers_of_their_own(llm, theirs):
    """IMG-07."""
    data = noise(60, 20).tobytes()
    images = [Image.frombytes("RGB", size, data) for size in ((60, 20), (20, 60), (40, 30))]
    orders = [(0, 1), (1, 0), (0, 2), (0, 1), (2, 2)]
    asked = [[ask("Hello", *(images[i] for i in order))] for order in orders]
    want = [theirs.answer(messages) for messages in asked]
    assert len({ids for _, ids in want}) == 4
    one_by_one = [llm.chat(messages, params(max_tokens=12)) for messages in asked]
    together = llm.chat(asked, params(max_tokens=12))
    for outs in (one_by_one, together):
        assert [(out.prompt_ids, out.token_ids) for out in outs] == want
    assert one_by_one[3].usage.cached_tokens == len(want[0][0]) - 1 > one_by_one[1].usage.cached_tokens


@pytest.mark.parametrize("step_tokens", [4, 7, 64])
def test_prompts_cut_within_a_picture_say_the_same(both, tmp_path, step_tokens):
    llm, theirs = both
    with LLM(llm.name, **{**OPTIONS, "step_tokens": step_tokens, "prefix_cache": False}) as other:
        messages = [ask("Hello", noise(40, 30), noise(90, 20))]
        out = other.chat(messages, params(max_tokens=12))
        assert (out.prompt_ids, out.token_ids) == theirs.answer(messages)


def test_everybody_is_right_where_the_pool_is_too_small(both):
    """Requests with pictures, of text alone, with the same pictures, preempted and computed again."""
    llm, theirs = both
    asked = [[ask(f"Question {i}", *[noise(40 + 7 * (j % 3), 30) for j in range(i % 4)])] for i in range(9)]
    want = [theirs.answer(messages, 30) for messages in asked]
    room = max(len(ids) + len(answer) for ids, answer in want) + 30
    for tokens in (16, 40):
        with LLM(llm.name, **{**OPTIONS, "kv_tokens": room, "step_tokens": tokens}) as small:
            names = [small.add_request(messages, params(max_tokens=30)) for messages in asked]
            while not all(map(small.finished, names)):
                small.step()
                small.engine.scheduler.check()
            assert sum(progress.preemptions for progress in small.in_flight().requests) > 0
            assert [(out.prompt_ids, out.token_ids) for out in map(small.result, names)] == want


def test_leaving_in_the_middle_of_a_picture_harms_nobody(llm, theirs):
    messages, stays = [ask("Hello", noise(40, 30), noise(90, 20))], [ask("Hello", noise(40, 30), noise(31, 31))]
    want = theirs.answer(stays)
    for steps in range(5):
        leaving, staying = llm.add_request(messages, params()), llm.add_request(stays, params(max_tokens=12))
        for _ in range(steps):
            llm.step()
        llm.abort(leaving)
        assert llm.result(leaving).finish_reason == "abort"
        while not llm.finished(staying):
            llm.step()
        assert (llm.result(staying).prompt_ids, llm.result(staying).token_ids) == want
        llm.forget(leaving), llm.forget(staying)


def test_streams_and_several_answers(llm):
    messages = [ask("Hello", noise(40, 30))]
    wish = params(n=3, temperature=1.0, max_tokens=10)
    want = llm.chat(messages, wish)
    deltas = list(llm.stream(messages, wish))
    for choice in want.choices:
        assert joined(deltas, choice.index) == (choice.text, choice.token_ids, choice.finish_reason)


def test_penalties_count_placeholders_as_transformers_does(llm, theirs):
    messages = [ask("Hello", noise(40, 30))]
    want = theirs.answer(messages, 20, repetition_penalty=1.7)
    out = llm.chat(messages, params(repetition_penalty=1.7))
    assert (out.prompt_ids, out.token_ids) == want != theirs.answer(messages, 20)


def test_a_picture_is_opened_cut_and_encoded_once(llm, encoded, monkeypatch):
    processor, cuts = llm._reader._processor, []
    prepare = processor.prepare
    monkeypatch.setattr(processor, "prepare", lambda picture: cuts.append(picture) or prepare(picture))
    picture = llm.open(noise(40, 30))
    assert llm.open(picture) is picture
    for text in ("Hello", "What?", "world"):
        llm.chat([ask(text, picture, picture)], params(max_tokens=2))
    assert cuts == [picture] and sum(encoded) == tiles_of(llm, noise(40, 30))
    llm.encode([ask("Hello", noise(31, 31))])
    assert cuts == [picture], "counting tokens needs no pixels"


def url_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_the_ways_to_name_a_picture(llm, tmp_path):
    image = noise(40, 30)
    image.save(tmp_path / "a.png")
    url = url_of(image)
    ways = [
        {"type": "image", "image": image}, {"type": "image", "image": llm.open(image)},
        {"type": "image", "image": str(tmp_path / "a.png")}, {"type": "image", "path": tmp_path / "a.png"},
        {"type": "image", "image": (tmp_path / "a.png").read_bytes()}, {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
    ]  # fmt: skip
    asked = [[{"role": "user", "content": [way, {"type": "text", "text": "Hello"}]}] for way in ways]
    outs = llm.chat(asked, params(max_tokens=5))
    assert {(out.prompt_ids, out.token_ids) for out in outs} == {(outs[0].prompt_ids, outs[0].token_ids)}
    assert outs[-1].usage.cached_tokens == len(outs[0].prompt_ids) - 1


def test_urls_are_opened_by_a_fetcher_alone(both):
    llm, theirs = both
    messages = [{"role": "user", "content": [{"type": "image", "url": "https://pictures.example/a.png"}]}]
    with pytest.raises(UsageError, match="not fetched here"):
        llm.chat(messages)

    class Shelf(Fetcher):
        def fetch(self, url, gone=None):
            return base64.b64decode(url_of(noise(40, 30)).split(",")[1])

    with LLM(llm.name, **OPTIONS, fetcher=Shelf()) as online:
        out = online.chat(messages, params(max_tokens=12))
        same = [{"role": "user", "content": [{"type": "image", "image": noise(40, 30)}]}]
        assert (out.prompt_ids, out.token_ids) == theirs.answer(same)


def test_placeholders_in_text(llm, theirs):
    """IMG-06: typed into a message it is text; in a prompt by hand it is a picture that is missing; an id is an id."""
    place = llm.cfg.vision.image_token
    typed = [{"role": "user", "content": "What is <image>?"}]
    out = llm.chat(typed, params(max_tokens=3))
    assert place not in out.prompt_ids and "<image>" in llm.tokenizer.decode(out.prompt_ids)
    beside = llm.chat([ask("What is <image>?", noise(40, 30))], params(max_tokens=3))
    assert beside.prompt_ids.count(place) == tiling.tokens(llm.cfg.vision, (30, 40))
    with pytest.raises(UsageError, match="0 pictures and 1 placeholder for them"):
        llm.generate("USER: <image>\nWhat? ASSISTANT:")
    ids = torch.tensor([[5, place, 6, 7]], device=DEVICE)
    with torch.no_grad():
        want = theirs.model(input_ids=ids).logits[0, -1].argmax().item()
    assert llm.generate(ids[0].tolist(), params(max_tokens=1)).token_ids == (want,)


def test_what_cannot_be_used_leaves_nothing_behind(llm, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    many = [ask("Hello", *[noise(24, 24)] * 65)]
    long = [ask("Hello", *[noise(90, 20, i) for i in range(50)])]
    cases = [
        ([ask("Hello", "nowhere.png")], UsageError, "no such file"), (many, UsageError, "at most 64"),
        ([ask("Hello", tmp_path / "text.png")], UsageError, "picture"), (long, ContextExceeded, "tokens"),
        ([{"role": "user", "content": [{"type": "image"}]}], UsageError, "no picture"),
        ([{"role": "user", "content": [{"type": "video"}]}], UsageError, "known: 'text', 'image'"),
    ]  # fmt: skip
    for messages, error, said in cases:
        with pytest.raises(error, match=said):
            llm.chat([[ask("Hello", noise(24, 24))], messages], params())
    assert llm.engine.idle


def test_of_several_pictures_an_error_says_which(llm, monkeypatch):
    """In the whole conversation, whether it cannot be opened, fetched, decoded or cut."""
    good, thin = noise(24, 24), Image.new("1", (1, 60_000))

    def ends(data, name):
        raise DecoderEnded(f"{name} has killed its decoder", "send another")

    class Away(Fetcher):
        def fetch(self, url, gone=None):
            raise SourceProblem(f"{url} cannot be reached", "try later")

    reader = Reader(llm.name, llm.cfg, llm.tokenizer, llm._reader._processor, Away(), ends)
    cases = [
        ("nowhere.png", UsageError, "'nowhere.png': there is no such file: check the path"),
        (b"no picture", DecoderEnded, "the picture has killed its decoder: send another"),
        ("https://a.example/b.png", SourceProblem, "https://a.example/b.png cannot be reached: try later"),
    ]
    if not llm.cfg.vision.resolutions:  # LLaVA-NeXT's grids are of bearable sizes
        monkeypatch.setattr(processor, "_MOST_BETWEEN", 1 << 20)
        cases.append((thin, UsageError, "the picture is 1 x 60000 pixels; this model's processor would make"))
    for bad, kind, said in cases:
        first = [ask("Hello", good), {"role": "assistant", "content": "Yes."}]
        for messages, which in [([ask("Hello", bad)], ""), ([*first, ask("And", bad, good)], "picture 2 of 3: ")]:
            with pytest.raises(kind) as info:
                reader.read(messages)
            assert type(info.value) is kind and str(info.value).startswith(which + said), info.value


def test_a_text_model_refuses_pictures():
    with LLM(DEMO, device="cpu", kv_tokens=300) as llm:
        messages = [ask("Hello", "nowhere.png")]
        for use in (lambda: llm.chat(messages), lambda: llm.open("nowhere.png"), lambda: llm.encode(messages)):
            with pytest.raises(UsageError, match=f"^{llm.name} takes text only: load a vision model"):
                use()
        assert llm.cfg.vision is None and llm.chat([ask("Hello")], params(max_tokens=2)).token_ids


def test_a_receipt(llm):
    picture = llm.open(noise(40, 30))
    count = tiling.tokens(llm.cfg.vision, (30, 40))
    line = str(llm.receipt(picture))
    assert line.startswith("40 x 30 -> ") and f"{count} tokens" in line
    assert llm.receipt(picture) == llm._reader._processor.receipt(picture, llm.plan.kv_token)


def test_a_prompt_can_be_read_beforehand(llm, theirs):
    messages = [ask("Hello", noise(40, 30))]
    read = llm.read(messages)
    assert llm.read(read) is read and llm.encode(read) == llm.encode(messages) == list(read.ids)
    want = theirs.answer(messages)
    for out in (llm.generate(read, params(max_tokens=12)), llm.generate([read, "x"], params(max_tokens=12))[0]):
        assert (out.prompt_ids, out.token_ids) == want


def test_any_end_of_text_ends_an_answer(both, tmp_path):
    """LLaVA's config.json has it in text_config."""
    llm, theirs = both
    messages = [ask("Hello", noise(40, 30))]
    _, answer = theirs.answer(messages)
    last = next(i for i, token in enumerate(answer) if i and token not in answer[:i])
    folder = make(tmp_path / "eos", bool(llm.cfg.vision.resolutions), eos=answer[last])
    with LLM(folder, **OPTIONS) as other:
        out = other.chat(messages, SamplingParams(max_tokens=12, temperature=0.0))
        assert (out.token_ids, out.finish_reason) == (answer[: last + 1], "stop")


def test_a_checkpoint_without_a_processor_is_refused(both, tmp_path):
    llm, _ = both
    folder = make(tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(Exception, match="no preprocessor_config.json"):
        LLM(folder, **OPTIONS)


@pytest.mark.parametrize("shape", ["tiny-llava-1.5-7b", "tiny-llava-1.6-mistral-7b"])
def test_random_weights_take_prepared_pixels(shape):
    options = {**OPTIONS, "kv_tokens": 600}
    with LLM(shape=shape, random_weights=True, **options) as llm:
        cfg, size = llm.cfg.vision, (30, 50)
        draw = np.random.default_rng(0)
        pixels = draw.normal(size=(tiling.tiles(cfg, size), 3, cfg.image_size, cfg.image_size)).astype(np.float32)
        count = tiling.tokens(cfg, size)
        ids = [5, *[cfg.image_token] * count, 6]
        outs = [
            llm.generate(Encoded(ids, ((1, tiles),)), params(max_tokens=4))
            for tiles in (Tiles(pixels, size, count), Tiles(pixels, size, count), Tiles(-pixels, size, count))
        ]
        assert [out.usage.cached_tokens for out in outs] == [0, count + 1, 1] and outs[0].prompt_ids == tuple(ids)
        assert outs[0].token_ids == outs[1].token_ids
        with pytest.raises(UsageError, match=f"needs {count} placeholders"):
            llm.generate(Encoded(ids[:-2], ((1, Tiles(pixels, size, count)),)))
        with pytest.raises(UsageError, match="no tokenizer"):
            llm.chat([ask("Hello", noise(24, 24))])
        with pytest.raises(UsageError, match="no image processor"):
            llm.receipt(None)
