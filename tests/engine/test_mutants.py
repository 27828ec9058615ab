"""Bugs sown one at a time into the engine: the tests beside this file must notice each (RDX-02, FLT-12).

A mutant is a piece of a module's source and what replaces it. Its functions are put into the living classes, so every
user of them is affected; what a class is and which errors it raises stay the same objects.
"""

import contextlib
import importlib
import inspect
import types
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.engine import (
    test_constraints,
    test_deadlines,
    test_drafts,
    test_engine,
    test_pictures,
    test_prefix,
    test_prompt_logprobs,
    test_request,
    test_sampling,
    test_scheduler,
    test_slots,
    test_spread,
)

QUICK = settings(
    max_examples=1000, stateful_step_count=30, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False,
)  # fmt: skip


def slots() -> None:
    test_slots.test_a_count_that_is_none_is_refused(-1)
    test_slots.test_slots_given_back_one_by_one_become_one_run_again(1)
    test_slots.test_a_run_that_was_taken_whole_is_forgotten()
    test_slots.test_a_slot_given_back_is_the_one_that_comes_next()
    run_state_machine_as_test(test_slots.SlotMachine, settings=QUICK)


def prefix() -> None:
    test_prefix.test_the_least_recently_used_tail_goes_first()
    run_state_machine_as_test(test_prefix.PrefixMachine, settings=QUICK)


def scheduler() -> None:
    for seed in range(150):
        test_scheduler.trace(seed)
    test_scheduler.test_cancel_in_every_state()
    test_scheduler.test_slots_on_stock_are_given_back_before_anybody_gives_way()
    test_scheduler.test_a_failed_request_is_not_cached()
    test_scheduler.test_an_evicted_request_is_next_in_line()
    test_scheduler.test_a_request_alone_may_fill_the_pool_to_the_last_slot(True)
    test_scheduler.test_no_decode_waits_for_a_long_prompt()
    test_scheduler.test_prompts_take_no_more_beside_decodes_than_they_may()
    test_scheduler.test_prompts_get_on_even_where_they_may_take_nothing()
    test_spread.test_a_step_with_decodes_has_as_many_tokens_as_it_should()
    test_spread.test_prompts_hurry_where_the_answers_under_way_end_first()
    test_spread.test_prompts_that_cannot_begin_make_no_hurry()
    test_spread.test_what_is_left_of_a_prompt_hurries_too()
    test_spread.test_tokens_under_way_count_as_answered(1, 512)
    run_state_machine_as_test(test_scheduler.SchedulerMachine, settings=QUICK)


def engine() -> None:
    for seed in range(8):
        test_engine.test_disorder_changes_no_answer(seed, seed % 4, seed % 3 == 0)
    test_engine.test_no_step_is_launched_for_a_token_behind_the_last()
    test_engine.test_slots_taken_back_from_a_stock_are_forgotten_by_the_device(2, False)
    test_engine.test_a_token_that_ended_an_answer_on_the_device_counts_as_computed_nowhere(2)
    test_sampling.test_a_batch_of_different_wishes_changes_nobody(25, 4, 4, True)
    test_sampling.test_the_end_of_an_answer()
    test_sampling.test_padding_of_the_vocabulary_is_never_sampled()
    test_sampling.test_logprobs_are_those_of_the_model(4)
    test_sampling.test_an_unusable_row_ends_its_request_alone(float("nan"), "logprobs", 4)
    test_sampling.test_a_token_that_the_model_does_not_have_is_refused_and_neighbours_go_on(16)
    test_engine.test_the_context_bounds_a_request_before_the_pool_does()
    with pytest.MonkeyPatch.context() as monkeypatch:
        error = RuntimeError("boom")
        test_engine.test_a_step_that_fails_ends_its_requests_and_nothing_else("sample", error, monkeypatch)


def deadlines() -> None:
    test_deadlines.test_a_deadline_ends_a_request_in_every_state()
    test_deadlines.test_those_who_have_ended_are_not_remembered_until_their_deadline()
    test_deadlines.test_the_moment_of_admission_is_the_first_one()
    with pytest.MonkeyPatch.context() as monkeypatch:
        test_deadlines.test_a_step_ends_who_is_late_before_it_plans(2, monkeypatch)


def request() -> None:
    for name in test_request.WHOLE | test_request.NUMBERS:
        test_request.test_a_number_out_of_range_is_refused_by_name(name)


def pictures() -> None:
    for seed in range(4):
        test_pictures.test_disorder_changes_no_answer(seed, seed % 4, seed % 3 == 0, test_pictures.TILED)
    test_pictures.test_pictures_of_one_step_are_encoded_together()
    test_pictures.test_what_is_kept_is_bounded_and_the_last_used_stay()
    test_pictures.test_a_picture_of_more_tiles_than_one_call_takes()
    test_pictures.test_swapped_pictures_are_another_prompt()
    test_pictures.test_the_same_pixels_in_another_shape_are_another_picture()
    test_pictures.test_a_prompt_that_ends_in_a_picture_and_is_cached_but_for_its_last_token()


def constraints() -> None:
    for case in ((60, 6, 9, 2, True), (25, 4, 4, 0, False)):
        test_constraints.test_a_constraint_holds_and_changes_nobody_else(*case)
    test_constraints.test_preemption_in_every_step(2)
    test_constraints.test_constrained_requests_alone_share_every_step()
    test_constraints.test_min_tokens_gives_way_to_a_constraint_that_must_end()
    test_constraints.test_a_grammar_of_another_model_is_refused()


def prompt_logprobs() -> None:
    for ahead, padded in ((0, False), (2, True)):
        test_prompt_logprobs.test_every_token_of_a_prompt_is_told(ahead, padded, True)
    for seed in range(12):
        test_prompt_logprobs.test_requests_that_give_way_tell_each_token_once(seed)


def drafts() -> None:
    test_drafts.test_what_is_guessed_followed_at_the_last_place(0)
    test_drafts.test_a_long_prompt_is_read_in_several_calls()
    test_drafts.test_after_a_guess_of_which_nothing_stood_there_is_a_pause()
    test_drafts.test_who_has_waited_for_nothing_does_not_wait_again_soon()
    test_drafts.test_while_drafts_are_under_way_a_request_is_left_out_and_may_leave()
    for batch, ahead, padded in ((1, 0, False), (3, 2, True)):
        test_drafts.test_text_that_repeats_itself_takes_fewer_steps(batch, ahead, padded)
    test_drafts.test_text_that_only_looks_repetitive_is_rarely_held_up(2)
    test_drafts.test_text_that_never_repeats_takes_the_steps_that_it_took(2, True)
    test_drafts.test_nothing_is_verified_beside_prompts_adjusted_logits_or_many()
    test_drafts.test_a_pool_that_is_almost_full_takes_shorter_drafts()
    test_drafts.test_a_stop_token_that_was_drafted_ends_the_answer()


MUTANTS: dict[str, list[tuple[str, str, Callable[[], None]]]] = {
    "slots": [
        ("if not used.all():", "if False:", slots),  # a free slot is freed
        ("not 0 < ordered[0]", "not 0 <= ordered[0]", slots),  # so is the pad slot
        ("if set(map(type, slots)) == {int}:", "if True:", slots),
        ("if not steps.all():", "if False:", slots),  # twice in one call
        ("if n > self.free_count:", "if n > self.free_count + 1:", slots),
        ("if type(n) is not int or n < 0:", "if False:", slots),
        ("if first in self._start:", "if False:", slots),  # runs are not joined
        ("if end in self._end:", "if False:", slots),
        ("((first, at), (stop, end))", "((first, at),)", slots),  # the rest of a run is lost
        ("self.free_count -= stop - at", "self.free_count -= 1", slots),
        ("after + 1 in self._end", "False", slots),  # runs are not continued
        ("self._in_use[at:stop] = True", "pass", slots),
        ("del self._start[end]\n        stop", "stop", slots),
        ("self._kept[first:end] = False", "pass", slots),
        ("range(1, self.total, size)", "range(1, self.total - 1, size)", slots),
        ("in_use[first : first + size])) - kept)", "in_use[first : first + size])))", slots),
        ("if self._end.get(first) == first - length:", "if first in self._end:", slots),  # a stale entry is believed
    ],
    "prefix": [
        ("upper.locks, upper.used = node.locks, node.used", "upper.used = node.used", prefix),
        ("or leaf.locks ", "", prefix),  # evicts what is in use
        ("node.used, node = now, node.parent", "node = node.parent", prefix),  # no LRU
        ("if leaf.used != used or", "if", prefix),  # what was touched since counts as old
        (
            "if edge[:high] == ids[start : start + high]:",
            "if edge[: high - 1] == ids[start : start + high - 1]:",
            prefix,
        ),
        ("if slot != other]", "if slot == other]", prefix),  # gives the wrong ones back
        ("self.size += len(leaf.slots)", "self.size += 1", prefix),
        ("self._mark(leaf.slots, True)", "pass", scheduler),
        ("self._mark(node.slots, change < 0)", "self._mark(node.slots, change > 0)", scheduler),
        ("freed += leaf.slots[cut:]", "freed += leaf.slots[cut + 1 :]", prefix),  # leaks one
        ("(0 if change > 0 else 1)", "(0 if change > 0 else 0)", prefix),
        ("Node(ids[done:], slots[done:], node)", "Node(ids[done:] if done else ids, slots[done:], node)", prefix),
        ("self._lock(node, 1)\n        return", "return", prefix),
        ("node = node.parent\n        self._offer(leaf)", "node = node.parent", prefix),  # never evictable again
        ("self._offer(parent)", "pass", prefix),
        ("del parent.children[leaf.tokens[0]]", "pass", prefix),
        ("upper.children[node.tokens[at]] = node", "pass", prefix),
        (
            "node.parent = node.tokens[at:], node.slots[at:], upper",
            "node.parent = node.tokens[at:], node.slots[at:], node.parent",
            prefix,
        ),
        ("self.size -= len(freed)", "self.size -= n", prefix),
        ("del leaf.tokens[cut:], leaf.slots[cut:]", "del leaf.slots[cut:]", prefix),
        ("low = middle\n", "low = high\n", prefix),
    ],
    "scheduler": [
        ("self.step_tokens - len(reading)", "self.step_tokens", scheduler),
        ("known = 0 if request.revealing else", "known =", prompt_logprobs),
        ("max(MOST_REVEALED - len(reading), 0)", "spare", prompt_logprobs),
        ("self.beside(decodes) - len(reading), 0)", "self.beside(decodes) + len(reading), 0)", scheduler),
        ("if decodes and (reading or", "if (reading or", scheduler),
        ("islice(self.waiting, len(self.free_rows))", "iter(self.waiting)", scheduler),
        ("max(self.spread(decodes), self._due(reading))", "self.spread(decodes)", scheduler),
        ("max(enough - len(reading), 0)", "enough", scheduler),
        ("max(*left, 1)", "max(left)", scheduler),
        ("prompts = [*reading, *", "prompts = [*", scheduler),
        ("youngest = self.running[-1]", "youngest = self.running[0]", scheduler),
        ("self.waiting.appendleft(request)", "self.waiting.append(request)", scheduler),
        ("else len(request.ids) - 1", "else len(request.ids)", scheduler),
        ("not self.slots.free_count and not self.prefix.evictable", "not self.slots.free_count", scheduler),
        ('if request.finish_reason in ("error", "grammar"):', "if False:", scheduler),  # damaged KV is cached
        ("self.prefix.unlock(request.node)", "pass", scheduler),
        ("self.prefix.unlock(node)\n            return False", "return False", scheduler),
        ("if request.finish_reason is None:\n            request.end", "if True:\n            request.end", scheduler),
        ("elif request in self.waiting:\n            self.waiting.remove(request)", "", scheduler),
        ("min(request.max_len, self.capacity + 1)", "min(request.max_len, self.capacity)", scheduler),
        ("if request.prompt_len >= request.max_len:", "if request.prompt_len > request.max_len:", scheduler),
        ("(decodes if request.decoding else prompts)", "prompts", scheduler),
        ("prompts.append((request, n - excess))", "pass", scheduler),
        ("excess -= min(n, excess)", "excess -= 1", scheduler),
        ("= list(slots), len(slots), len(slots), node", "= list(slots), 0, len(slots), node", scheduler),
        ("self.free_rows.append(request.row)", "self.free_rows.append(0)", scheduler),
        ("spare -= n - 1", "pass", scheduler),
        ("while self.waiting and self.free_rows and", "while self.waiting and", scheduler),
        (
            "self.slots.free(self.prefix.evict(need - self.slots.free_count))",
            "self.prefix.evict(need - self.slots.free_count)",
            scheduler,
        ),
        ("request.slots[max(request.cached, request.shared) :])\n            del", "[])\n            del", scheduler),
        ("self.free_rows.pop(), 0", "self.free_rows.pop(), request.written", engine),  # a stale table
        ("caught_up = n == request.pending", "caught_up = True", scheduler),
        ("max(len(request.ids) - 1, request.shared)", "len(request.ids)", engine),  # what was never computed is cached
        ("request.row is None or request.satisfied or", "request.row is None or", engine),
        ("request.satisfied or request.unread:", "request.satisfied:", constraints),
        ("if request.flying:", "if False:", engine),
        ("and self._deadlines[0][0] <= now:", "and self._deadlines[0][0] < now:", deadlines),
        ("is None:\n                self.cancel(request,", "is None:\n                request.end(", deadlines),
        ("if entry[2].finish_reason is None]", "if entry[2].row is not None]", deadlines),
        ("= len(slots), time.monotonic()", "= len(slots), request.arrived", deadlines),
        ("            self._unstock()", "            pass", scheduler),
        ("keep = request.cached + 1", "keep = request.cached", scheduler),
        ("del request.slots[keep:]", "pass", scheduler),
        ("request.written = min(request.written, keep)", "pass", engine),
        ("self.prefix.insert(request.keys(cached)", "self.prefix.insert(request.ids[:cached]", pictures),
        ("-1 if sent else request.cached", "-1 if request.pending > 1 else request.cached", pictures),
        ("and not prompts and len(decodes) <= FEW", "and len(decodes) <= FEW", drafts),
        ("and not prompts and len(decodes) <= FEW", "and not prompts", drafts),
        ("if any(request.adjusted for request, _ in decodes):", "if False:", drafts),
        ("if request.flying and guess:", "if request.flying:", drafts),  # those without a match wait too
        ("if request.flying and guess:", "if False:", drafts),  # drafts behind a token that is not known
        ("del request.drafts[n - 1 :]", "pass", drafts),
        ("return plain + drafted", "return drafted + plain", drafts),
        ("request.stood + stood", "request.stood + stood + 1", drafts),
        ("request.lookup.pause(request.ids)", "pass", drafts),
        ("request.cached = request.held = len(request.ids) - 1", "pass", drafts),
    ],
    "request": [
        ("not low <= value <= high:", "value < low or value > high:", request),  # NaN passes
        ("type(value) not in (kind, int) or ", "", request),
        ("if token < 0:", "if token < -1:", engine),
        ("elif len(self.ids) >= self.max_len:", "elif len(self.ids) > self.max_len:", scheduler),
        (
            "if token in self.stop_ids and len(self.ids) > self.min_len:",
            "if token in self.stop_ids[:1]:",
            engine,
        ),
        ("self.constraint.advance(token)", "pass", constraints),
        ("if self.constraint is None else 0)", ")", constraints),
        (" or self.constraint is not None\n", "\n", constraints),
        (" or bool(self.drafts))", ")", drafts),
        ("len(self.drafts) - self.cached", "0 - self.cached", drafts),
        ("tiles.keys[: max(end - start, 0)]", "self.ids[start : min(start + tiles.tokens, end)]", pictures),
        ("(int(self.digest, 16) + 1) << 32", "1 << 32", pictures),
        ("hashlib.blake2b(repr(self.size).encode(),", "hashlib.blake2b(", pictures),
        ("Part(tiles, low - start, high - low, low - first)", "Part(tiles, 0, high - low, low - first)", pictures),
    ],
    "vision": [
        ("self._kept.move_to_end(part.tiles.digest)", "pass", pictures),
        ("own.clone()", "own", pictures),
        ("[part.first : part.first + part.count]", "[: part.count]", pictures),
        ("(*self._kept.values(), *features)", "self._kept.values()", pictures),
        ("tiles.digest in self._kept or tiles.digest in group", "tiles.digest in group", pictures),
        (".split(MOST_TILES)", ".split(10**6)", pictures),
    ],
    "draft": [
        ("range(first + size, end + 1)", "range(first + size - 1, end)", drafts),
        ("max(self._read - size + 1, 0)", "self._read", drafts),
        ("for size in (_LONG, _SHORT):", "for size in (_SHORT, _LONG):", drafts),
        ("at + i % (len(ids) - at)", "min(at + i, len(ids) - 1)", drafts),
        ("self._promised and not found and not missing", "False", drafts),
        ("self._resting = len(ids) + _PAUSE", "pass", drafts),
        ("if end < len(ids) - 1:", "if False:", drafts),
    ],
    "state": [
        ("if request.params.penalized:", "if False:", engine),  # a row inherits
        ("(output + PROMPT * (prompt > 0))", "output", engine),
        ("(output + PROMPT * (prompt > 0))", "(output + prompt)", engine),
        (
            "request.ids[: request.prompt_len], request.output)",
            "request.ids[: request.prompt_len], request.ids)",
            engine,
        ),
        ("if request.params.logit_bias:", "if False:", engine),
        ("[min(r.min_len,", "[min(r.min_len - r.prompt_len,", engine),
        ("[int(p.penalized) for p in params]", "[0 for p in params]", engine),
        ("[r.cached for r in requests]", "[r.cached + 1 for r in requests]", engine),
        ("[r.ids[-1] if one else 0 for", "[0 for", engine),
        ('"top_p": [p.top_p for', '"top_p": [p.min_p for', engine),
        ("np.arange(start + first, start + end)", "np.arange(start, start + end - first)", engine),
        ("request.written = len(request.slots)", "request.written = len(request.slots) + 1", engine),
        (" + request.row * self.table.shape[1]", "", engine),
        ("if request.written == 0]", "if request.written == 0 and not request.preemptions]", engine),
        ("self.ended[self.pad_row] = 1", "pass", engine),
        ("if going_on.any():", "if True:", constraints),
        ("for token in request.stop_ids:", "for token in ():", constraints),
        ("[int(r.constraint is not None) for", "[0 for", constraints),
    ],
    "runner": [
        ('arrays["logits_at"][b] = end, end - 1', 'arrays["logits_at"][b] = end, at', engine),
        ("= row if wanted else pad", "= row", engine),
        (
            'range(first, first + len(tokens))\n        arrays["kv_len"][b]',
            'range(len(tokens))\n        arrays["kv_len"][b]',
            engine,
        ),
        ('arrays["kv_len"][b] = first + len(tokens)', 'arrays["kv_len"][b] = len(tokens)', engine),
        ("if not prompts and self._sent == (shape, rows):", "if not prompts and self._sent:", engine),
        ("self.raw[:requests].copy_(logits)", "self.raw[:requests].copy_(-logits)", engine),
        ("s.seeds, self.usable", "s.seeds, s.vocab", engine),
        ('arrays["rows"][:] = arrays["samples"][:] = pad', "pass", engine),
        ("part._replace(at=at + part.at)", "part", pictures),
        ("range(first + 1, first + 1 + len(tokens))", "range(first, first + len(tokens))", drafts),
        ("decodes=requests if verifies else n", "decodes=n", drafts),
        ("(n, requests, shape.samples)]", "(n, requests, 1)]", drafts),
        ("s.ring[:, first:]", "s.ring", drafts),
        ("self.fixed if samples == 1 else self.verifying", "self.fixed", drafts),
        ("self.revealed = logits[n:]", "self.revealed = logits", prompt_logprobs),
        ("self.encoder is not None and shape.prompts > 0", "self.encoder is not None and shape.decodes == 0", pictures),
    ],
    "engine": [
        ('self.scheduler.fail(plan, "error")', "pass", engine),
        ("max(ids) < self.cfg.vocab", "max(ids) <= self.cfg.vocab", engine),
        ("request.max_len = min(request.max_len, self.cfg.max_len)", "pass", engine),
        ("range(shape.decodes, shape.requests, s", "range(len(rows), shape.requests, s", engine),
        ("any(request.adjusted for request in requests)", "False", engine),
        ("self.launched % len(self.state.ring)", "(self.launched + 1) % len(self.state.ring)", engine),
        ("and token >= 0:\n", ":\n", engine),
        ("self.state.step.fill_(self._line)\n                raise", "pass\n                raise", engine),
        ("gather(self.runner.raw[", "gather(-self.runner.raw[", engine),
        ("position == len(request.prompt_logprobs) + 1", "True", prompt_logprobs),
        ("at += n\n        return found", "at += 1\n        return found", prompt_logprobs),
        ("request.ids[first + 1 : end + 1]", "request.ids[first:end]", prompt_logprobs),
        ("is not None and n == request.pending]", "is not None and request.cached == 0]", constraints),
        ("place + 1 + len(request.drafts)]", "place + len(request.drafts)]", drafts),
        ("lambda token: token != NO_TOKEN", "lambda token: True", drafts),
        ("if request.decoding and not request.drafts]", "if request.decoding]", drafts),
        ("+ request.drafts  # behind", "  # behind", drafts),
        ("due = 0  #", "due = self.ahead  #", constraints),
        ("!= words_of(self.cfg.vocab):", "!= len(request.constraint.allowed):", constraints),
        ("news = self.scheduler.expire(time.monotonic())", "news = []", deadlines),
        ("(len(self.flights) > due or", "(len(self.flights) > due + 1 or", engine),
    ],
}


@contextlib.contextmanager
def sown(name: str, old: str, new: str):
    """The module with one bug in it, for a while."""
    module = importlib.import_module(f"lite_llm.engine.{name}")
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{name}.py has {source.count(old)} times {old!r}: renew this mutant"
    space = dict(vars(module))
    exec(compile(source.replace(old, new), f"<mutant of {name}>", "exec"), space)
    with pytest.MonkeyPatch.context() as patch:
        for key, cls in list(vars(module).items()):
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                mutant, space[key] = space[key], cls
                for attribute, value in vars(mutant).items():
                    if isinstance(value, (types.FunctionType, property)):
                        patch.setattr(cls, attribute, value)
        yield


@pytest.mark.parametrize(
    "killer",
    [slots, prefix, scheduler, engine, deadlines, request, pictures, prompt_logprobs, drafts],
    ids=lambda f: f.__name__,
)
def test_nothing_is_found_where_nothing_was_sown(killer):
    killer()


@pytest.mark.parametrize(
    "name, old, new, killer",
    [pytest.param(name, *m, id=f"{name}-{i}") for name, mutants in MUTANTS.items() for i, m in enumerate(mutants)],
)
def test_a_sown_bug_is_found(name, old, new, killer):
    with sown(name, old, new), pytest.raises(BaseException) as found:  # noqa: B017, PT011
        killer()
    assert not isinstance(found.value, (NameError, SyntaxError)), "the mutant itself is broken"
