"""One forward of training: batch in, loss out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longllava.data.packing import Batch
from longllava.model import Model
from longllava.nn import Context
from longllava.train.alignment import alignment_loss
from longllava.train.config import AidsConfig
from longllava.train.loss import answer_loss


class Forward(nn.Module):
    """Model and loss as one module, so that DDP and DeepSpeed see one forward a batch.

    Every batch has a gradient, if one of zeros: a process whose rows are all text would leave the others waiting.
    evenly: every process runs the same modules, as ZeRO wants it: rows of text alone carry a picture of zeros along.
    """

    def __init__(self, model: Model, aids: AidsConfig, evenly: bool = False):
        super().__init__()
        self.model, self.aids, self.evenly = model, aids, evenly

    def forward(
        self, batch: Batch, pictures: Tensor | None, tokens_per_image: int | None, alignment_only: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next-token loss summed over labels, plus the aids; and sums of what was measured.

        alignment_only: the alignment aid alone, without running the backbone.
        """
        model, images_NMD = self.model, None
        blank = pictures is None and self.evenly and model.bridge is not None
        if blank:
            pictures = self.no_picture(batch.ids_BL.device)
        if pictures is not None:
            if pictures.dtype == torch.uint8:  # the encoder trains
                assert model.encoder is not None
                pictures = model.encoder(pictures)
            images_NMD = model.image_tokens(pictures, tokens_per_image)
        if alignment_only:
            aligned = None if images_NMD is None else self.alignment(images_NMD, batch)
            if aligned is not None:
                loss = aligned * batch.n_labels
            else:  # rows of text alone, or no caption with a telling word
                loss = torch.zeros((), device=batch.ids_BL.device) if images_NMD is None else 0 * images_NMD.sum()
            return self.touched(loss), {"loss": loss.detach()}
        x_BLD = model.embed(batch.ids_BL, batch.spans, None if blank else images_NMD)
        if blank and images_NMD is not None:
            x_BLD = x_BLD + 0 * images_NMD.sum()
        aided = self.aids.grounding_weight > 0 and len(batch.grounding) > 0
        context = Context(batch.seq_idx_BL, batch.positions_BL, grounding_G4=batch.grounding if aided else None)
        hidden_BLD, _ = model.backbone(x_BLD, context)
        reported = context.close()
        if self.aids.alignment_weight > 0 and images_NMD is not None:
            aligned = self.alignment(images_NMD, batch)
            if aligned is not None:
                reported["alignment"] = aligned
        names, source_BL = sources_of(batch)
        answers = answer_loss(model.backbone.logits, hidden_BLD, batch.labels_BL, groups_BL=source_BL,
                              n_groups=len(names))  # fmt: skip
        loss = answers.total
        weights = self.weights()
        measured = {"loss": answers.total.detach(), "accuracy": answers.n_right}
        for name, total, n_labels in zip(names, answers.of_group, answers.n_of_group):
            measured |= {f"loss/{name}": total, f"labels/{name}": n_labels}
        for name, value in reported.items():
            # aids are means, the answers' loss is a sum that is divided by its labels later
            measured[name] = value.detach() * batch.n_labels
            if name in weights:
                loss = loss + weights[name] * batch.n_labels * value
        return self.touched(loss), measured

    def weights(self) -> dict[str, float]:
        """Of the losses beyond the next token; the router's is the mean over layers, as transformers' Jamba has it."""
        backbone = self.model.config.backbone
        n_routers = sum(backbone.has_experts(layer) for layer in range(backbone.n_layers))
        return {"grounding": self.aids.grounding_weight, "alignment": self.aids.alignment_weight,
                "router": self.aids.router_weight / max(1, n_routers)}  # fmt: skip

    def alignment(self, images_NMD: Tensor, batch: Batch) -> Tensor | None:
        embed = self.model.backbone.embed_tokens
        # by a call, not by its weight: ZeRO-3 has a module's weights together only while it is called
        words_VD = embed(torch.arange(embed.num_embeddings, device=batch.ids_BL.device))
        aligned = alignment_loss(images_NMD, batch.spans, batch.labels_BL, batch.seq_idx_BL, words_VD)
        return 0 * words_VD.sum() if aligned is None and self.evenly else aligned

    def no_picture(self, device: torch.device) -> Tensor:
        encoder, config = self.model.encoder, self.model.config.encoder
        assert config is not None
        if encoder is not None and any(p.requires_grad for p in encoder.parameters()):
            return torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8, device=device)
        return torch.zeros(1, config.grid() ** 2, config.width, device=device)

    def touched(self, loss: Tensor) -> Tensor:
        """`loss` with a gradient: of zeros where nothing that trains took part in it."""
        if loss.requires_grad:
            return loss
        return loss + 0 * sum(p.flatten()[0] for p in self.model.parameters() if p.requires_grad)


def sources_of(batch: Batch) -> tuple[list[str], Tensor]:
    """Names of the sources of a batch, and which of them each token is of."""
    names = sorted(set(batch.sources))
    numbers = torch.tensor([names.index(source) for source in batch.sources], device=batch.ids_BL.device)
    n_samples_B = batch.seq_idx_BL.amax(1).long() + 1
    first_B = n_samples_B.cumsum(0) - n_samples_B
    return names, numbers[(first_B[:, None] + batch.seq_idx_BL.long()).clamp(0, len(numbers) - 1)]
