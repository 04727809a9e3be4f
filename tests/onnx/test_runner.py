"""OrtRunner: requests that come and go in a pool of slots give what each of them gives alone."""

import json
import random
import shutil

import numpy as np
import pytest

from dtr_deploy.engines.ort_model import OrtModel
from dtr_deploy.engines.ort_runner import OrtRunner
from dtr_deploy.engines.ort_states import StatePool
from dtr_deploy.engines.prefix_store import PrefixStore
from dtr_deploy.engines.sampling import Sampling
from dtr_deploy.engines.torch import TorchEngine
from dtr_deploy.errors import UsageError

LENGTHS = (1, 7, 63, 64, 65, 130)
LAYOUTS = pytest.mark.parametrize(
    "forms", (None, (None, "gated_deltanet", "gla", "gated_deltanet"), (None, "gla", "hedgehog", "jet"))
)


@pytest.fixture(scope="module")
def model_of(exported):
    """An open model of one thread for each export."""
    made = {}

    def get(*arguments, **options):
        torch_model, folder = exported(*arguments, **options)
        if folder not in made:
            made[folder] = OrtModel(folder, threads=1)
        return torch_model, made[folder]

    return get


def drain(runner):
    events = list(runner.stream())
    assert runner.free_slots == runner.slots and runner.unfinished == 0
    return events


def unending(tokens):
    """The reference goes on after the end of a text; a request does not."""
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


@LAYOUTS
@pytest.mark.parametrize("window", (0, 64))
@pytest.mark.parametrize(("slots", "chunk"), ((1, 512), (3, 40), (8, 1)))
def test_generates_what_hugging_face_does(slots, chunk, window, forms, model_of, prompts):
    reference, model = model_of("qwen3", forms, window)
    texts = prompts(*LENGTHS)
    runner = OrtRunner(model, slots=slots, capacity=200, prefill_chunk=chunk)
    expected = [unending(tokens) for tokens in TorchEngine(reference).generate(texts, 40)]
    assert runner.generate(texts, 40) == expected
    assert runner.free_slots == slots


@LAYOUTS
def test_slots_are_reused_from_zeros(forms, model_of, prompts):
    """More requests than slots, of different lengths and budgets, so that rows move and slots change hands."""
    _, model = model_of("llama", forms)
    dice = random.Random(0)
    texts = prompts(*(dice.choice((1, 5, 30, 66, 90)) for _ in range(24)))
    budgets = [dice.randint(1, 30) for _ in texts]
    alone = [
        OrtRunner(model, slots=1, capacity=128).generate([text], budget, stop_tokens=())[0]
        for text, budget in zip(texts, budgets, strict=True)
    ]
    runner = OrtRunner(model, slots=4, capacity=128, prefill_chunk=32)
    requests = [runner.submit(text, budget, stop_tokens=()) for text, budget in zip(texts, budgets, strict=True)]
    drain(runner)
    assert [request.tokens for request in requests] == alone


def test_a_dirty_slot_shows_if_it_is_not_cleared(model_of, prompts, monkeypatch):
    """That the test above would see states of an earlier request."""
    _, model = model_of()
    first, second = prompts(60, 20)
    runner = OrtRunner(model, slots=1, capacity=128)
    clean = runner.generate([second], 12, stop_tokens=())
    monkeypatch.setattr(StatePool, "clear", lambda pool, slot: None)
    runner.generate([first], 12, stop_tokens=())
    assert runner.generate([second], 12, stop_tokens=()) != clean


@LAYOUTS
def test_decoding_after_a_padded_batch(forms, model_of, prompts):
    """The other way to fill slots, one call for several rows with padding on the right: states at each last token."""
    reference, model = model_of("qwen2", forms)
    texts, lengths = prompts(*LENGTHS), np.array(LENGTHS)
    pool = StatePool(model, len(texts), 160)
    real = np.arange(max(LENGTHS)) < lengths[:, None]
    ids = np.zeros(real.shape, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    tokens = [pool.call(0, ids, real.astype(np.int64))[:, 0].argmax(-1)]
    for step in range(19):
        mask = (np.arange(160) < (lengths + step)[:, None]).astype(np.int64)
        mask[:, -1] = 1
        tokens.append(pool.call(0, tokens[-1][:, None], mask)[:, 0].argmax(-1))
    assert np.stack(tokens, 1).tolist() == TorchEngine(reference).generate(texts, 20)


def test_stream_gives_every_token_and_one_end(model_of, prompts):
    reference, model = model_of()
    texts = prompts(3, 70, 9)
    runner = OrtRunner(model, slots=2, capacity=128)
    requests = [runner.submit(text, 10) for text in texts]
    events = drain(runner)
    for request, expected in zip(requests, TorchEngine(reference).generate(texts, 10), strict=True):
        mine = [token for owner, token in events if owner is request]
        assert mine == [*unending(expected), None] and mine[:-1] == request.tokens
        assert request.finish_reason == ("stop" if 2 in expected else "length")


def test_stop_tokens(model_of, prompts):
    _, model = model_of()
    runner = OrtRunner(model, slots=2, capacity=128)
    text = prompts(30)[0]
    whole = runner.generate([text], 20, stop_tokens=())[0]
    end = next(i for i in range(3, 20) if whole[i] not in whole[:i])
    request = runner.submit(text, 20, stop_tokens=[whole[end]])
    drain(runner)
    assert request.tokens == whole[:end] and request.finish_reason == "stop"
    request = runner.submit(text, 20, stop_tokens=[whole[0]])
    assert drain(runner) == [(request, None)] and request.tokens == []


def test_abort_at_every_stage(model_of, prompts):
    _, model = model_of()
    texts = prompts(90, 20, 90, 20)
    alone = OrtRunner(model, slots=1, capacity=128).generate(texts, 12, stop_tokens=())
    runner = OrtRunner(model, slots=3, capacity=128, prefill_chunk=30)
    requests = [runner.submit(text, 12, stop_tokens=()) for text in texts]
    runner.step()  # a piece of the first
    runner.abort(requests[0])
    assert requests[0].tokens == [] and runner.free_slots == 3
    seen = []
    for request, token in runner.stream():
        seen.append((request, token))
        if request is requests[1] and token is not None and len(request.tokens) == 4:
            runner.abort(requests[3])  # waits or decodes
            runner.abort(request)
            runner.abort(request)
    assert [request.finish_reason for request in requests] == ["aborted", "aborted", "length", "aborted"]
    assert requests[1].tokens == alone[1][:4] and requests[2].tokens == alone[2]
    for request in requests:
        mine = [token for owner, token in seen if owner is request]
        assert mine.count(None) == 1 and mine[-1] is None
    assert runner.free_slots == 3
    assert runner.generate(texts, 12, stop_tokens=()) == alone


def test_abort_while_another_prompt_is_half_in(model_of, prompts):
    """The decoding rows shrink below the slot that is being filled, which has to move up."""
    _, model = model_of()
    texts = prompts(10, 11, 100)
    alone = OrtRunner(model, slots=1, capacity=128).generate(texts, 15, stop_tokens=())
    runner = OrtRunner(model, slots=3, capacity=128, prefill_chunk=20)
    requests = [runner.submit(text, 15, stop_tokens=()) for text in texts]
    runner.step()
    runner.step()
    assert requests[1].tokens and not requests[2].tokens and runner.free_slots == 0
    runner.abort(requests[0])
    runner.abort(requests[1])
    drain(runner)
    assert requests[2].tokens == alone[2]


def test_a_prompt_delays_the_others_by_a_piece(model_of, prompts):
    _, model = model_of()
    short, long = prompts(4, 120)
    runner = OrtRunner(model, slots=2, capacity=200, prefill_chunk=20)
    first = runner.submit(short, 30, stop_tokens=())
    runner.step()
    second = runner.submit(long, 3, stop_tokens=())
    before = len(first.tokens)
    while not second.tokens:
        runner.step()
    assert len(first.tokens) - before == 6


def test_sampling_does_not_depend_on_the_batch(model_of, prompts):
    _, model = model_of()
    texts = prompts(5, 40, 70, 12)
    sampling = [Sampling(0.9, top_k=20, seed=i) for i in range(4)]
    alone = [
        OrtRunner(model, slots=1, capacity=128).generate([text], 15, sampling=how)[0]
        for text, how in zip(texts, sampling, strict=True)
    ]
    runner = OrtRunner(model, slots=4, capacity=128)
    requests = [runner.submit(text, 15, sampling=how) for text, how in zip(texts, sampling, strict=True)]
    drain(runner)
    assert [request.tokens for request in requests] == alone
    other = runner.generate([texts[0]], 15, sampling=Sampling(0.9, top_k=20, seed=9))[0]
    greedy = runner.generate([texts[0]], 15)[0]
    assert len({tuple(tokens) for tokens in (alone[0], other, greedy)}) == 3


@LAYOUTS
def test_snapshot_goes_on_where_it_was_taken(forms, model_of, prompts):
    _, model = model_of("llama", forms)
    text, other = prompts(70, 30)
    runner = OrtRunner(model, slots=2, capacity=200)
    runner.submit(other, 60, stop_tokens=())
    request = runner.submit(text, 40, stop_tokens=())
    while len(request.tokens) < 10:
        runner.step()
    snapshot = runner.snapshot(request)
    assert list(snapshot.tokens) == text + request.tokens[:9]
    drain(runner)
    again = runner.submit(text + request.tokens[:10], 30, stop_tokens=(), start=snapshot)
    branch = runner.submit([*snapshot.tokens, *other], 10, stop_tokens=(), start=snapshot)
    drain(runner)
    assert again.tokens == request.tokens[10:] and again.cached_tokens == 79
    expected = OrtRunner(model, slots=1, capacity=200).generate([[*snapshot.tokens, *other]], 10, stop_tokens=())
    assert branch.tokens == expected[0]


@LAYOUTS
def test_shared_prefix_is_computed_once(forms, model_of, prompts):
    _, model = model_of("llama", forms)
    prefix, *ends = prompts(85, 1, 20, 65)
    texts = [prefix + end for end in ends]
    alone = OrtRunner(model, slots=1, capacity=200, prefix_bytes=0).generate(texts, 12, stop_tokens=())
    runner = OrtRunner(model, slots=2, capacity=200, prefill_chunk=32)
    requests = [runner.submit(text, 12, stop_tokens=(), shared=85) for text in texts]
    drain(runner)
    assert [request.tokens for request in requests] == alone
    assert [request.cached_tokens for request in requests] == [0, 80, 80]
    assert runner.prefixes.hits == 2 and len(runner.prefixes) == 1
    # A prompt has to compute its last token, so it cannot start from its own end.
    request = runner.submit(prefix[:80], 1, shared=80)
    drain(runner)
    assert request.cached_tokens == 0


def test_chat_goes_on_from_a_kept_state(model_of, prompts):
    reference, model = model_of()
    first, second = prompts(50, 30)
    runner = OrtRunner(model, slots=2, capacity=200)
    turn = runner.submit(first, 12, stop_tokens=(), keep=True)
    drain(runner)
    text = first + turn.tokens + second
    answer = runner.submit(text, 12, stop_tokens=())
    drain(runner)
    assert answer.cached_tokens == 61  # all but the answer's last token, which was never put in
    assert answer.tokens == TorchEngine(reference).generate([text], 12)[0]


def test_prefix_store_drops_what_was_not_used_for_longest(model_of, prompts):
    _, model = model_of()
    pool = StatePool(model, 1, 64)
    texts = prompts(10, 10, 10, 20)
    snapshots = [pool.save(0, text) for text in texts]
    store = PrefixStore(2 * snapshots[0].nbytes)
    assert all(store.put(snapshot) for snapshot in snapshots[:2])
    assert store.longest([*texts[0], 1]) is snapshots[0]
    assert store.put(snapshots[2])
    assert texts[1] not in store and texts[0] in store and texts[2] in store
    assert (store.hits, store.misses, store.evicted) == (1, 0, 1)
    assert store.longest(texts[0]) is None  # nothing would be left to compute
    assert store.nbytes == 2 * snapshots[0].nbytes <= store.budget
    assert not PrefixStore(100).put(snapshots[3])
    longer = PrefixStore(10**9)
    longer.put(pool.save(0, texts[3][:5]))
    longer.put(pool.save(0, texts[3][:15]))
    assert longer.longest(texts[3]).tokens == tuple(texts[3][:15])


def test_memory_of_a_slot(model_of):
    """MIXED has one full layer and three linear ones: 2 kv heads of 32, window 64, float32."""
    _, model = model_of()
    caches, states = 2 * 2 * 32 * 4, 3 * 2 * (32 * 32 + 2 * 32 * 64) * 4
    for capacity in (10, 1000):
        assert OrtRunner(model, slots=3, capacity=capacity).bytes_per_slot == caches * capacity + states


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"slots": 0}, "slots is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prefix_bytes": -1}, "prefix_bytes is -1"),
        ({"capacity": 9000}, "capacity is 9000.*8192"),
        ({"capacity": 1}, "capacity is 1"),
    ),
)
def test_options_out_of_range(options, words, model_of):
    _, model = model_of()
    with pytest.raises(UsageError, match=words):
        OrtRunner(model, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    (
        ([], {}, "no tokens"),
        ([5] * 60, {}, r"60 tokens and 10 new ones exceed.*64"),
        ([5, 512], {}, "id 512; accepted: 0 to 511"),
        ([5, -1], {}, "id -1"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([5], {"shared": 2}, "shared is 2"),
    ),
)
def test_requests_that_are_refused(prompt, options, words, model_of):
    _, model = model_of()
    runner = OrtRunner(model, slots=1, capacity=64)
    with pytest.raises(UsageError, match=words):
        runner.submit(prompt, **{"max_new_tokens": 10, **options})
    assert runner.unfinished == 0


def test_snapshots_that_are_refused(model_of, prompts):
    _, model = model_of()
    runner = OrtRunner(model, slots=1, capacity=64)
    request = runner.submit(prompts(10)[0], 5, stop_tokens=())
    with pytest.raises(UsageError, match="a request that runs"):
        runner.snapshot(request)
    runner.step()
    snapshot = runner.snapshot(request)
    for prompt in ([1, *snapshot.tokens], list(snapshot.tokens), list(snapshot.tokens[:5])):
        with pytest.raises(UsageError, match="does not go on"):
            runner.submit(prompt, 5, start=snapshot)


def test_half_precision(model_of, prompts):
    """Caches in float16, states in float32; each row as it is alone."""
    _, model = model_of(precision="fp16")
    texts = prompts(20, 70, 33)
    assert {array.dtype for array in StatePool(model, 1, 8).arrays.values()} == {np.dtype("f2"), np.dtype("f4")}
    alone = OrtRunner(model, slots=1, capacity=128).generate(texts, 12, stop_tokens=())
    assert OrtRunner(model, slots=3, capacity=128).generate(texts, 12, stop_tokens=()) == alone


def test_export_whose_caches_grow_is_refused(exported, tmp_path):
    _, folder = exported()
    shutil.copytree(folder, tmp_path / "onnx")
    path = tmp_path / "onnx" / "genai_config.json"
    config = json.loads(path.read_text())
    config["search"]["past_present_share_buffer"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"cannot be written in place.*export the model again"):
        OrtRunner(tmp_path / "onnx")
