"""The flow teacher: a small rectified-flow MMDiT and its two text towers, on the UNet teacher's autoencoder.

Two CLIP towers suffice for these captions, so the T5 that the pipeline requires outputs 256 tokens of zeros, as Stable
Diffusion 3 uses them without its T5. These tokens stay equal in every layer, so training keeps one of them and counts
it 256 times in each softmax: the same network, on a sixth of the text tokens.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from teacher.attributes import Heads, attribute_classes, attribute_labels
from teacher.autoencoder import latents_of, load_vae
from teacher.loop import Budget, Figures, Run, images_of, last_loss, train
from teacher.text import load_tokenizer, tokenize
from torch import Tensor, nn

from stepdistill.data import avatars
from stepdistill.errors import InputError

SILENT = 256  # T5 tokens that StableDiffusion3Pipeline uses by default


class Towers(nn.Module):
    """SD3's two CLIP towers, states concatenated as in `StableDiffusion3Pipeline.encode_prompt`."""

    def __init__(self, towers: list[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.width = sum(tower.config.hidden_size for tower in towers)
        self.pooled_width = sum(tower.config.projection_dim for tower in towers)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Maps token ids (B, S) to the states before the last layer (B, S, D) and the pooled text (B, P)."""
        outputs = [tower(ids, output_hidden_states=True) for tower in self.towers]
        return torch.cat([s.hidden_states[-2] for s in outputs], -1), torch.cat([s.text_embeds for s in outputs], -1)


def run_flow_text(run: Run, sizes: list[dict], budget: Budget) -> Figures:
    """Trains two towers as `text` trains one: to predict from the pooled states which attributes a caption names."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    data, tokenizer = avatars.load("train"), load_tokenizer(run)
    common = {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    towers = Towers([CLIPTextModelWithProjection(CLIPTextConfig(**common, **size)) for size in sizes])
    heads = Heads(towers.pooled_width, [len(values) + 1 for values in attribute_classes().values()])
    model = nn.ModuleDict({"towers": towers, "heads": heads}).to(run.device)
    ids = tokenize(tokenizer, data.captions, run.device)
    labels = attribute_labels("train", mentioned_only=True).to(run.device)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (budget.batch_size,), generator=generator)
        return heads.loss(towers(ids[index])[1], labels[index])

    model.load_state_dict(train("flow_text", model, loss, budget, run), strict=False)
    model.eval()
    with torch.no_grad():
        _, pooled = towers(tokenize(tokenizer, avatars.load("test").captions, run.device))
        accuracy = heads.accuracy(pooled, attribute_labels("test", mentioned_only=True).to(run.device)).mean()
    for i, tower in enumerate(towers.towers):
        tower.save_pretrained(run.out / f"flow_text_encoder_{i + 1}")
    return {"held_out_accuracy": round(accuracy.item(), 5)}  # mentioned and unmentioned attributes, from captions


def load_towers(run: Run) -> Towers:
    """The towers of the `flow_text` stage."""
    from transformers import CLIPTextModelWithProjection

    folders = [run.out / f"flow_text_encoder_{i}" for i in (1, 2)]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"{missing[0]}: not there; run the stage flow_text first")
    return Towers([CLIPTextModelWithProjection.from_pretrained(f).eval() for f in folders]).to(run.device)


def silent_t5(width: int):
    """A T5 that outputs zeros, since the weights of its last norm are zero; and a tokenizer that knows no words."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    tower = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(tower.encoder.final_layer_norm.weight)
    return tower.eval(), tokenizer


class CountedAttention:
    """SD3's joint attention, in which the last text token counts as `SILENT` equal ones."""

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps image tokens (B, N, D) and text tokens (B, S, D) to tokens of the same shapes."""
        split = lambda x: x.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = (split(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (split(layer(encoder_hidden_states)) for layer in layers)
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        q, k, v = torch.cat([q, text_q], 2), torch.cat([k, text_k], 2), torch.cat([v, text_v], 2)
        count = F.pad(q.new_zeros(k.shape[2] - 1), (0, 1), value=math.log(SILENT))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=count[None]).transpose(1, 2).flatten(2)
        picture, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


def run_flow(run: Run, sizes: dict, scheduler: dict, budget: Budget, caption_dropout: float, dtype: str) -> Figures:
    """Trains rectified flow (Liu et al. 2022) with logit-normal(0, 1) times (Esser et al. 2024, section 3.1) on cached
    latents and text states; then writes the whole pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    vae, tokenizer, towers = load_vae(run), load_tokenizer(run), load_towers(run)
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline adds it
    network = SD3Transformer2DModel(
        joint_attention_dim=towers.width, pooled_projection_dim=towers.pooled_width, **sizes
    ).to(run.device)
    usual = network.attn_processors
    network.set_attn_processor(CountedAttention())
    latents = latents_of(vae, images_of("train", run.device)) * vae.config.scaling_factor
    with torch.no_grad():
        ids = tokenize(tokenizer, ["", *avatars.load("train").captions], run.device)
        encoded = [towers(b) for b in ids.split(500)]
        texts = F.pad(torch.cat([text.to(torch.bfloat16) for text, _ in encoded]), (0, 0, 0, 1))
        pooled = torch.cat([p for _, p in encoded])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (budget.batch_size,), generator=generator)
        t = torch.randn(budget.batch_size, generator=generator).sigmoid().to(run.device)
        eps = torch.randn(budget.batch_size, *latents.shape[1:], generator=generator).to(run.device)
        has_caption = torch.rand(budget.batch_size, generator=generator) >= caption_dropout
        x0, row = latents[index], (index + 1) * has_caption  # row 0 is the empty caption
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))
        student_flow = network(
            hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=texts[row], pooled_projections=pooled[row],
            return_dict=False,
        )[0]  # fmt: skip
        return (student_flow.float() - (eps - x0)).square().mean()

    network.load_state_dict(train("flow", network, loss, budget, run), strict=False)  # all but its position table
    network.set_attn_processor(usual)
    t5, t5_tokenizer = silent_t5(towers.width)
    pipeline = StableDiffusion3Pipeline(
        transformer=network.eval(), scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), vae=vae,
        text_encoder=towers.towers[0], tokenizer=tokenizer, text_encoder_2=towers.towers[1],
        tokenizer_2=copy.deepcopy(tokenizer), text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    )  # fmt: skip
    pipeline.to(dtype=getattr(torch, dtype)).save_pretrained(run.out / "flow-teacher")
    return {"parameters": sum(p.numel() for p in network.parameters()), "flow_loss": last_loss(run, "flow")}
