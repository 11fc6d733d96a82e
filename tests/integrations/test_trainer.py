"""Training by transformers' own loop: the loss is the library's, a frozen encoder stays, what is saved is a folder."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

import longllava.integrations.transformers  # noqa: F401
from longllava.api import LongLLaVA
from longllava.config import BridgeConfig, EncoderConfig
from longllava.integrations.transformers.cache import CACHE
from longllava.nn import Context
from longllava.train.loss import answer_loss
from tests.tiny import tiny_model, tiny_pictures

# its name in 5.23, and before
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing")
                     if name in TrainingArguments.__dataclass_fields__)  # fmt: skip
# a stem with batch norms, which would learn where they should not
STEM = EncoderConfig(image_size=16, patch_size=4, width=16, n_layers=1, n_heads=2, mlp_width=32, select_layer=-1,
                     stem_widths=(8,), stem_strides=(4,), stem_blocks=(1,))  # fmt: skip
TALKS = [
    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]},
     {"role": "assistant", "content": answer}]
    for image, answer in zip(tiny_pictures(4), ("a red heart", "the s", "of", "a heart"))
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model(3, encoder=STEM, bridge=BridgeConfig(tokens_per_image=4, hidden=32))
    return model.save_pretrained(tmp_path_factory.mktemp("tiny"))


def collated(processor):
    def collate(talks):
        features = processor.apply_chat_template(
            talks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding_side="right"
        )
        learned = features.pop("assistant_masks") == 1
        return {**features, "labels": features["input_ids"].masked_fill(~learned, -100)}

    return collate


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def test_the_loss_is_the_librarys(folder, model, processor):
    """Against answer_loss on the library's own model, row by row without padding."""
    batch = collated(processor)(TALKS)
    library = LongLLaVA.from_pretrained(folder, device="cpu", dtype="float32").model
    total, n_labels, seen = 0.0, 0, 0
    for row in range(len(TALKS)):
        real = batch["attention_mask"][row] == 1
        ids, labels = batch["input_ids"][row, real][None], batch["labels"][row, real][None]
        start = (ids[0] == 0).nonzero()[0, 0]
        tokens = library.image_tokens(library.encode(batch["pixel_values"][seen : seen + 1]))
        hidden, _ = library(library.embed(ids, torch.tensor([[0, start, 4, 0]]), tokens), Context())
        answers = answer_loss(library.logits, hidden[:, :-1], labels[:, 1:])
        total, n_labels, seen = total + answers.total, n_labels + answers.n_labels, seen + 1
    output = model(**batch)
    torch.testing.assert_close(output.loss, total / n_labels, rtol=0, atol=1e-6)
    assert output.logits.shape[:2] == batch["input_ids"].shape and output.get(CACHE) is None
    torch.testing.assert_close(model(**batch, num_items_in_batch=7).loss, total / 7, rtol=0, atol=1e-5)
    logits = torch.log_softmax(output.logits[:, :-1], -1)
    labels = batch["labels"][:, 1:]
    picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    torch.testing.assert_close(output.loss, -picked.mean(), rtol=0, atol=1e-6)


def test_gradients_are_the_same_when_checkpointed(model, processor):
    batch = collated(processor)(TALKS)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            getattr(model, f"{CHECKPOINTING}_enable")()
        assert model.backbone.gradient_checkpointing == checkpointed
        model.train()
        output = model(**batch)
        assert output.logits is None  # all positions' at once would not fit
        model.zero_grad()
        output.loss.backward()
        gradients.append({name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {name.split(".")[0] for name in gradients[0]} == {"bridge", "backbone"}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [logs["loss"]] if "loss" in logs else []


def test_trainer_trains_saves_and_goes_on(folder, model, processor, tmp_path):
    losses = Losses()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=2, use_cpu=True,
            gradient_accumulation_steps=2, learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1,
            save_steps=4, report_to=[], remove_unused_columns=False, disable_tqdm=True, **{CHECKPOINTING: True},
        )  # fmt: skip
        return Trainer(model, arguments, collated(processor), TALKS, processing_class=processor, callbacks=[losses])

    trainer(model, 8).train()
    assert losses.seen[-1] < 0.5 * losses.seen[0]
    for key, tensor in model.state_dict().items():
        if key.startswith("encoder."):
            assert torch.equal(tensor, before[key]), key
    assert not torch.equal(model.state_dict()["bridge.up.weight"], before["bridge.up.weight"])
    last = tmp_path / "out/checkpoint-8"
    back = LongLLaVA.from_pretrained(last, device="cpu", dtype="float32")
    expected = model.eval().state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in back.model.state_dict().items())
    again = AutoModelForImageTextToText.from_pretrained(folder)
    trainer(again, 8).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    found = again.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_smoothed_labels_are_those_of_the_next_tokens(model, processor, tmp_path):
    """Trainer makes this loss itself, and shifts the labels of classes alone that it has in a table."""
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=1e-6, use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments, processing_class=processor)
    batch = collated(processor)(TALKS)
    torch.testing.assert_close(trainer.compute_loss(model.train(), dict(batch)), model(**batch).loss, rtol=0, atol=1e-4)


def test_an_encoder_may_be_told_to_train(model, processor):
    batch = collated(processor)(TALKS)
    model.encoder.requires_grad_(True)
    model.train()
    assert model.encoder.training
    model(**batch).loss.backward()
    assert model.encoder.position_embedding.grad.abs().sum() > 0
