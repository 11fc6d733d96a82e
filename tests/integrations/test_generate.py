"""transformers' generate and its caches: answers are LongLLaVA's."""

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from longllava.errors import InputError
from longllava.integrations.transformers import modeling
from longllava.integrations.transformers.cache import CACHE
from tests.integrations.talks import N_NEW, PICTURES, TALKS, answers, prepared, user


@pytest.mark.parametrize("talk", TALKS)
def test_greedy_answers_are_the_librarys(library, model, processor, talk):
    expected = library.generate(talk, max_new_tokens=N_NEW)
    assert expected.strip()
    inputs = prepared(processor, talk)
    assert answers(model, processor, inputs) == [expected]
    assert answers(model, processor, inputs, use_cache=False) == [expected]


def test_under_autocast_a_cache_changes_nothing(model, processor):
    """As accelerate leaves a model that was trained in bf16."""
    inputs = prepared(processor, TALKS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        whole, kept = (model(**inputs, use_cache=use_cache).logits[:, -1].float() for use_cache in (False, True))
        assert (kept - whole).norm() < 0.05 * whole.norm()
        assert all(answers(model, processor, inputs))


def test_a_padded_batch_answers_as_each_row_alone(library, model, processor):
    inputs = prepared(processor, TALKS)
    assert inputs["attention_mask"].sum(1).unique().numel() == 3 and bool((inputs["attention_mask"][:, -1] == 1).all())
    assert answers(model, processor, inputs) == [library.generate(talk, max_new_tokens=N_NEW) for talk in TALKS]


def test_rows_that_end_in_padding_are_not_answered(model, processor):
    """An answer would begin after the padding, another one than without. Losses and logits may be had of such rows."""
    longer = {"padding": "max_length", "max_length": 120}
    for talks in (TALKS, TALKS[:1]):
        inputs = prepared(processor, talks, padding_side="right", **longer)
        for options in ({}, {"use_cache": False}, {"num_beams": 2}):
            with pytest.raises(InputError, match="attention_mask: rows end in padding, .* pad on the left"):
                answers(model, processor, inputs, **options)
        left = prepared(processor, talks, padding_side="left", **longer)
        losses = []
        for batch in (inputs, left):
            mask = batch["attention_mask"]
            learned = (mask == 1) & (mask.cumsum(1) > 1)  # nothing foretells a row's first token
            losses.append(model(**batch, labels=batch["input_ids"].masked_fill(~learned, -100)).loss)
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("pad", [2, 0], ids=["eos", "picture"])  # Trainer sets the tokenizer's, where pictures stand
def test_without_a_mask_pad_ids_before_a_row_are_padding_and_within_it_pictures(library, model, processor, pad):
    model.generation_config.pad_token_id = pad
    for talks in (TALKS, TALKS[1:2], [TALKS[0], [user("a")]]):
        inputs = prepared(processor, talks)
        del inputs["attention_mask"]
        assert answers(model, processor, inputs) == [library.generate(talk, max_new_tokens=N_NEW) for talk in talks]
    right = prepared(processor, [TALKS[0], [user("a")]], padding_side="right")
    with pytest.raises(InputError, match="attention_mask: rows end in padding, .* pad on the left"):
        model.generate(right["input_ids"], max_new_tokens=1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_are_done_wait_for_the_others(model, processor, use_cache):
    """Also where they go on with the id on which pictures stand, which without a cache are looked for at each step."""
    inputs = prepared(processor, TALKS)
    ids = model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ends = {"eos_token_id": [int(ids[0, 3])], "use_cache": use_cache}
    assert (ids[1:, :5] != ids[0, 3]).all()
    expected = answers(model, processor, inputs, **ends, pad_token_id=2)
    assert expected[0] == processor.decode(ids[0, :4], skip_special_tokens=True)
    assert answers(model, processor, inputs, **ends, pad_token_id=0) == expected


def test_a_prompt_is_read_in_chunks(monkeypatch, library, model, processor):
    expected = [library.generate(talk, max_new_tokens=N_NEW) for talk in TALKS]
    inputs = prepared(processor, TALKS)
    with torch.no_grad():
        whole = model(**inputs, use_cache=False).logits
        monkeypatch.setattr(modeling, "CHUNK_TOKENS", 15)  # five of each row: cut inside pictures and padding
        lengths: list[int] = []
        hook = model.backbone.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
        parts = model(**inputs, use_cache=True)
        hook.remove()
        last = model(**inputs, use_cache=True, logits_to_keep=7).logits
    torch.testing.assert_close(last, whole[:, -7:], rtol=0, atol=1e-5)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(parts.logits[real], whole[real], rtol=0, atol=1e-5)
    assert max(lengths) == 5 and sum(lengths) == inputs["input_ids"].shape[1]
    assert parts[CACHE].get_seq_length() == inputs["input_ids"].shape[1]
    assert answers(model, processor, inputs) == expected


def test_sampling(model, processor):
    inputs = prepared(processor, TALKS[1])
    assert answers(model, processor, inputs, do_sample=True, top_k=1) == answers(model, processor, inputs)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn += answers(model, processor, inputs, do_sample=True, temperature=3.0, num_return_sequences=2)
    assert drawn[:2] == drawn[4:] and len(set(drawn[:4])) == 4


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_follows_its_rows(model, processor, use_cache):
    """With four beams the rows of the cache change places at every step; the likeliest found is no less likely."""
    inputs = prepared(processor, TALKS)  # of no, one and three pictures
    how = {"max_new_tokens": N_NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        beams = model.generate(**inputs, num_beams=4, use_cache=use_cache, **how)
        # what the beams say of their own likelihood, against a plain forward over the sequences they found
        ids, start = beams.sequences, inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, start:])], dim=1)
        whole = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False)
        logp = torch.log_softmax(whole.logits[:, start - 1 : -1], -1)
    picked = logp.gather(-1, ids[:, start:, None])[..., 0]
    ends = [(row == 2).nonzero()[0, 0].item() + 1 if (row == 2).any() else len(row) for row in ids[:, start:]]
    expected = torch.stack([picked[row, :end].sum() / end for row, end in enumerate(ends)])
    torch.testing.assert_close(beams.sequences_scores, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_of_embeddings_is_answered_as_its_tokens(library, model, processor, use_cache):
    inputs = prepared(processor, TALKS)
    ids, mask, pixels = (inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    how = {"attention_mask": mask, "use_cache": use_cache, "max_new_tokens": N_NEW, "do_sample": False}
    with torch.no_grad():
        embedded = model.embedded(ids, mask, 0, pixels, None)
        found = [model.generate(inputs_embeds=embedded, num_beams=n_beams, **how) for n_beams in (1, 2)]
    expected = [library.generate(talk, max_new_tokens=N_NEW) for talk in TALKS]
    assert processor.batch_decode(found[0], skip_special_tokens=True) == expected
    beams = answers(model, processor, inputs, num_beams=2)
    assert processor.batch_decode(found[1], skip_special_tokens=True) == beams


def test_a_cache_goes_on_where_it_was(library, model, processor):
    """The conversation so far stays in the cache; the next turn brings its own pictures only."""
    first, rest = [user(PICTURES[0], "what is this?")], TALKS[2]
    talk = [*first, {"role": "assistant", "content": "a red heart"}, *rest[2:]]
    begun, whole = prepared(processor, first), prepared(processor, talk)
    cut = begun["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :cut], begun["input_ids"])
    with torch.no_grad():
        cache = model(**begun)[CACHE]
        onward = {**whole, "pixel_values": whole["pixel_values"][1:], CACHE: cache}
        ids = model.generate(**onward, max_new_tokens=N_NEW, do_sample=False)
    found = processor.decode(ids[0, whole["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == library.generate(talk, max_new_tokens=N_NEW)
    with pytest.raises(InputError, match="2 pictures are 2 x 4 tokens, but the rows of input_ids have room for .4."):
        model.generate(**{**onward, "pixel_values": whole["pixel_values"], CACHE: model(
            **begun, use_cache=True)[CACHE]}, max_new_tokens=1)  # fmt: skip


def test_a_cache_knows_its_padding_where_no_mask_is_given(model, processor):
    """Positions are counted from a row's first token, on which log_length_scale looks."""
    inputs = prepared(processor, TALKS)
    more = torch.tensor([[300, 301], [302, 303], [304, 305]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    with torch.no_grad():
        given, none = (model(more, attention_mask=mask, **{CACHE: model(**inputs)[CACHE]}) for mask in (mask, None))
    torch.testing.assert_close(none.logits, given.logits, rtol=0, atol=0)


def test_a_prompt_that_the_cache_holds_already_is_not_read_again(model, processor):
    """generate would hand over all of it, or, of a shorter one, a part: an answer to a prompt and a half."""
    inputs = prepared(processor, TALKS[1])
    with torch.no_grad():
        cache, length = model(**inputs)[CACHE], inputs["input_ids"].shape[1]
        for cut in (length, length - 3):
            shorter = {"input_ids": inputs["input_ids"][:, :cut], CACHE: cache, "max_new_tokens": 2}
            for more in ({}, {"attention_mask": inputs["attention_mask"][:, :cut]}, {"num_beams": 1}):
                with pytest.raises(InputError, match=f"{CACHE}: it holds {length} tokens, the prompt has {cut}; give"):
                    model.generate(**shorter, **more)


def test_a_cache_has_a_row_for_each_beam(model, processor):
    inputs = prepared(processor, TALKS[1])
    ids, cut = inputs["input_ids"], inputs["input_ids"].shape[1] - 4
    begun = {**inputs, "input_ids": ids[:, :cut], "attention_mask": inputs["attention_mask"][:, :cut]}
    asked = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "num_beams": 3, "do_sample": False}
    with torch.no_grad():
        cache = model(**begun, use_cache=True)[CACHE]
        with pytest.raises(InputError, match=f"{CACHE}: its rows are 1, those of this call 3; for beams"):
            model.generate(**asked, **{CACHE: cache}, max_new_tokens=N_NEW)
        cache.batch_repeat_interleave(3)
        found = model.generate(**asked, **{CACHE: cache}, max_new_tokens=N_NEW)
    assert processor.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True) == answers(
        model, processor, inputs, num_beams=3
    )


def test_room_is_made_once(model, processor):
    inputs = prepared(processor, TALKS[1])
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False, return_dict_in_generate=True)
    keys = found[CACHE].state[1].buffer.keys_BSGK
    assert keys.shape[1] == inputs["input_ids"].shape[1] + N_NEW


def test_an_answer_of_no_stated_end_takes_no_room_for_one(model, processor):
    inputs = prepared(processor, TALKS[1])
    ends = {"do_sample": False, "eos_token_id": list(range(model.config.vocab_size))}
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=10**12, **ends)
    assert found.shape[1] == inputs["input_ids"].shape[1] + 1


def test_streamed_text_is_the_answer(library, model, processor):
    inputs = prepared(processor, TALKS[1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answers(model, processor, inputs, streamer=streamer)
    whole = library.generate(TALKS[1], max_new_tokens=N_NEW)
    assert "".join(streamer) == whole
    stopped = answers(model, processor, inputs, stop_strings=[whole[2:4]], tokenizer=processor.tokenizer)
    assert stopped[0].endswith(whole[2:4]) and stopped[0] == whole[: len(stopped[0])] != whole


def test_bytes_of_another_dtype_are_not_taken_as_normalised(model, processor):
    """datasets' torch format makes int64 of what the processor gave; .float() is soon written."""
    inputs = prepared(processor, TALKS)
    pixels = inputs["pixel_values"]
    normalised = (pixels - model.encoder.mean) / model.encoder.std
    assert answers(model, processor, {**inputs, "pixel_values": normalised}) == answers(model, processor, inputs)
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        with pytest.raises(InputError, match=rf"pixel_values: got {dtype} from 0 to 255, expected uint8, as the proc"):
            answers(model, processor, {**inputs, "pixel_values": pixels.to(dtype)})
    normalised[1, 0, 3, 3] = torch.nan  # as a division by a standard deviation of 0 leaves it
    with pytest.raises(InputError, match="pixel_values: got torch.float32 from nan to nan, expected uint8"):
        answers(model, processor, {**inputs, "pixel_values": normalised})


def test_pictures_and_places_must_agree(model, processor):
    inputs = prepared(processor, TALKS)
    pixels = inputs["pixel_values"]
    for wrong in (pixels[:3], torch.cat([pixels, pixels[:1]])):
        with pytest.raises(InputError, match=rf"{len(wrong)} pictures .* have room for \[0, 4, 12\]"):
            model(**{**inputs, "pixel_values": wrong})
    ids = inputs["input_ids"].clone()
    slots = ((ids[1] == 0) & (inputs["attention_mask"][1] == 1)).nonzero()[:2, 0]
    ids[1, slots] = 9  # half a picture's room goes over to the next row
    ids[2, -2:] = 0
    with pytest.raises(InputError, match=r"4 pictures .* have room for \[0, 2, 14\]"):
        model(**{**inputs, "input_ids": ids})
    unmasked = {"input_ids": prepared(processor, TALKS[1])["input_ids"], "pixel_values": pixels[:1]}
    assert answers(model, processor, unmasked) == answers(model, processor, prepared(processor, TALKS[1]))


def test_what_has_no_meaning_here_is_refused(model, processor):
    inputs = prepared(processor, TALKS[0])
    for change, words in (
        ({CACHE: DynamicCache()}, "got a DynamicCache; this model's layers keep a LongLLaVACache"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: got \(1, 3\), expected \(1, \d+\)"),
        ({"labels": inputs["input_ids"][:, 1:]}, r"labels: got \(1, (\d+)\), expected \(1, \d+\), one for each token"),
        ({"labels": inputs["input_ids"][0]}, r"labels: got \(\d+,\), expected \(1, \d+\)"),
        ({"output_hidden_states": True}, "output_hidden_states: this model gives logits"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "give input_ids, with pixel_values or without, or inputs_embeds"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(*inputs["input_ids"].shape, 32),
          "pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "or inputs_embeds alone"),
    ):
        with pytest.raises(InputError, match=words):
            model(**{**inputs, **change})
    cache = model(**inputs, use_cache=True)[CACHE]
    for call in (cache.crop, cache.activate_past_recording):
        with pytest.raises(InputError, match="cannot be taken back out"):
            call()
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    with pytest.raises(InputError, match="resize_token_embeddings"):
        model.resize_token_embeddings(100)


def test_ways_to_generate_that_there_are_not_are_refused(model, processor):
    """The cache is of one kind; a prompt is read in chunks anyway; healed, it would lose its pictures and special
    tokens; continuous batching is attention's alone, and ended in a thread, of which generate gave the bare prompt."""
    inputs = prepared(processor, TALKS[0])
    expected = answers(model, processor, inputs)
    assert answers(model, processor, inputs, cache_implementation="dynamic") == expected
    for change, words in (
        ({"cache_implementation": "quantized"}, "cache_implementation: got 'quantized', allowed: 'dynamic'"),
        ({"cache_implementation": "static"}, "cache_implementation: got 'static', allowed: 'dynamic'"),
        ({"prefill_chunk_size": 5}, "prefill_chunk_size: a prompt is read in chunks as it is"),
        ({"token_healing": True, "tokenizer": processor.tokenizer}, "token_healing: a prompt's pictures and special"),
        ({"cache_implementation": "paged"}, "continuous batching: .* give generate padded rows"),
    ):
        with pytest.raises(InputError, match=words):
            answers(model, processor, inputs, **change)
    with pytest.raises(InputError, match="continuous batching"):
        model.generate_batch(inputs["input_ids"].tolist())
