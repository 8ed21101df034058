"""Multi-head attention with feedback weights for its packed projections.

``nn.MultiheadAttention`` hands its weights to one function that reads them itself, so the projections
cannot be exchanged from outside: this is that function's mathematics again, operation by operation (the
outputs are bit-identical), with untied projections. Attention itself multiplies activities by
activities; its backward pass needs no weight.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath import ops
from feedbackpath.layers import FeedbackLayer


class FeedbackMultiheadAttention(FeedbackLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with a feedback weight for each of its projections.

    The packed projection ``in_proj_weight`` ``[3 E, E]`` has ``feedback``; separate projections
    (``kdim``, ``vdim``) have ``q_feedback``, ``k_feedback`` and ``v_feedback``; ``out_proj`` is a
    feedback layer of its own.
    """

    plain_type = nn.MultiheadAttention
    feedback: nn.Parameter | None
    q_feedback: nn.Parameter | None
    k_feedback: nn.Parameter | None
    v_feedback: nn.Parameter | None

    def untied_names(self) -> dict[str, str]:
        """Return the name of each projection weight with the name of its feedback weight."""
        if self._qkv_same_embed_dim:
            return {"in_proj_weight": "feedback"}
        return {f"{part}_proj_weight": f"{part}_feedback" for part in "qkv"}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention's output and weights; arguments and shapes as in ``nn.MultiheadAttention``."""
        if not self._takes_gradients(query, key, value):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        is_batched = query.dim() == 3
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True needs an attn_mask as well, as in nn.MultiheadAttention: pass "
                "nn.Transformer.generate_square_subsequent_mask(length)"
            )
        query, key, value = _sequence_first(query, key, value, is_batched, self.batch_first)
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        use_causal_kernel = is_causal and key_padding_mask is None and not need_weights
        mask = None if use_causal_kernel else _as_float_mask(attn_mask, query.dtype)
        key_mask = _as_float_mask(key_padding_mask, query.dtype)

        q, k, v = self._project(query, key, value)
        k, v, mask, key_mask = self._extend_keys(k, v, mask, key_mask)
        length, batch_size, _ = query.shape
        heads = [
            part.reshape(part.shape[0], batch_size * self.num_heads, self.head_dim).transpose(0, 1)
            for part in (q, k, v)
        ]
        mask = self._merge_masks(mask, key_mask, batch_size)
        mixed, weights = self._attend(heads, mask, batch_size, need_weights, use_causal_kernel)
        output = self.out_proj(mixed).view(length, batch_size, -1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _takes_gradients(self, *inputs: Tensor) -> bool:
        """Whether a backward pass can come; without one, PyTorch's own code and fast path serve."""
        tensors = (*inputs, *self.parameters())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _projection(self, name: str, x: Tensor, rows: slice, bias_rows: slice) -> Tensor:
        """Project ``x`` by ``rows`` of the weight that the feedback weight ``name`` belongs to."""
        weight_name = {feedback: weight for weight, feedback in self.untied_names().items()}[name]
        weight = cast(Tensor, getattr(self, weight_name))[rows]
        feedback = cast(Tensor | None, getattr(self, name))
        bias = None if self.in_proj_bias is None else self.in_proj_bias[bias_rows]
        if feedback is None:
            return self._tapped(name, x, F.linear(x, weight, bias), rows)
        return self._tapped(name, x, ops.linear(x, weight, feedback[rows], bias), rows)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q, k, v ``[L, N, E]``, in one product where inputs are the same tensor."""
        size = self.embed_dim
        parts = [slice(i * size, (i + 1) * size) for i in range(3)]
        inputs = (query, key, value)
        if not self._qkv_same_embed_dim:
            projected = [
                self._projection(f"{part}_feedback", x, slice(None), rows)
                for part, x, rows in zip("qkv", inputs, parts, strict=True)
            ]
        elif query is key and key is value:
            packed = self._projection("feedback", query, slice(None), slice(None))
            projected = _unpack(packed, 3)
        elif key is value:
            rest = slice(size, 3 * size)
            packed = self._projection("feedback", key, rest, rest)
            projected = [self._projection("feedback", query, parts[0], parts[0]), *_unpack(packed, 2)]
        else:
            projected = [
                self._projection("feedback", x, rows, rows) for x, rows in zip(inputs, parts, strict=True)
            ]
        q, k, v = projected
        return q, k, v

    def _extend_keys(
        self, k: Tensor, v: Tensor, mask: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Append the learned key and value (``add_bias_kv``) and a zero one (``add_zero_attn``)."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k.repeat(1, k.shape[1], 1), self.bias_v.repeat(1, k.shape[1], 1)))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, *k.shape[1:]), v.new_zeros(1, *v.shape[1:])))
        for extra_k, extra_v in extra:
            k, v = torch.cat([k, extra_k]), torch.cat([v, extra_v])
            mask = None if mask is None else F.pad(mask, (0, 1))
            key_mask = None if key_mask is None else F.pad(key_mask, (0, 1))
        return k, v, mask, key_mask

    def _merge_masks(self, mask: Tensor | None, key_mask: Tensor | None, batch_size: int) -> Tensor | None:
        """Return one additive mask that broadcasts to ``[N * heads, L, S]``."""
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(0)
        if key_mask is None:
            return mask
        per_head = key_mask.view(batch_size, 1, 1, -1).expand(-1, self.num_heads, -1, -1)
        per_head = per_head.reshape(batch_size * self.num_heads, 1, -1)
        return per_head if mask is None else mask + per_head

    def _attend(
        self,
        heads: list[Tensor],
        mask: Tensor | None,
        batch_size: int,
        need_weights: bool,
        use_causal_kernel: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed values ``[L * N, E]`` and the attention weights ``[N, heads, L, S]`` or None."""
        q, k, v = heads
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scaled, keys = q * math.sqrt(1.0 / q.shape[-1]), k.transpose(-2, -1)
            scores = torch.bmm(scaled, keys) if mask is None else torch.baddbmm(mask, scaled, keys)
            weights = F.softmax(scores, dim=-1)
            if dropout > 0.0:
                weights = F.dropout(weights, p=dropout)
            mixed = torch.bmm(weights, v).transpose(0, 1).reshape(-1, self.embed_dim)
            return mixed, weights.view(batch_size, self.num_heads, q.shape[1], -1)
        if mask is not None:
            mask = (
                mask.unsqueeze(0)
                if mask.shape[0] == 1
                else mask.view(batch_size, self.num_heads, -1, k.shape[1])
            )
        q, k, v = (part.view(batch_size, self.num_heads, -1, self.head_dim) for part in heads)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, use_causal_kernel)
        return mixed.permute(2, 0, 1, 3).reshape(-1, self.embed_dim), None


def _sequence_first(
    query: Tensor, key: Tensor, value: Tensor, is_batched: bool, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring inputs to ``[L, N, E]``; inputs that are one tensor stay one, so that projections can pack."""
    if not is_batched:  # torch loses the identity of inputs here, and projects each by itself
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    arranged: dict[int, Tensor] = {}
    for x in (query, key, value):
        if id(x) not in arranged:
            arranged[id(x)] = x.transpose(0, 1) if batch_first else x
    return arranged[id(query)], arranged[id(key)], arranged[id(value)]


def _as_float_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return an additive mask: True in a boolean mask becomes minus infinity."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _unpack(packed: Tensor, num_parts: int) -> list[Tensor]:
    """Split ``[L, N, parts * E]`` into ``parts`` contiguous tensors, in the memory order torch uses."""
    *shape, size = packed.shape
    parts = (
        packed.view(*shape, num_parts, size // num_parts)
        .unsqueeze(0)
        .transpose(0, -2)
        .squeeze(-2)
        .contiguous()
    )
    return list(parts.unbind(0))
