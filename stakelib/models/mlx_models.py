"""Base models in MLX: converted once, loaded with an adapter, asked, and scored like every other engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stakelib.models.adapters import MLX_FILES, check_adapter, shapes
from stakelib.models.catalog import BaseModel, cache_folder
from stakelib.models.chat import Rendered
from stakelib.models.engines import Transformers
from stakelib.run import CourseError, atomic_write_json, sha256, writing

BITS = {"nf4": 4, "int8": 8}  # the neutral recipe's names; MLX packs in groups of 64 with a scale and an offset


def mlx_folder(base: BaseModel, precision: str) -> Path:
    """The base model in MLX's form, made once by `mlx_lm convert` and kept in the cache.

    `precision`: "float32", "bfloat16", "int8" or "nf4" (8 or 4 bits; embeddings too, the rest in bfloat16).
    """
    own = f"{base.name}-{sha256(base.source_json)[:8]}-{precision}"
    folder = cache_folder() / "mlx" / own
    if folder.exists():
        return folder
    packed = ["--quantize", "--q-bits", str(BITS[precision])] if precision in BITS else []
    dtype = "bfloat16" if packed else precision
    print(f"{base.name}: converting to MLX ({precision}), once", flush=True)
    with writing(folder) as part:
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(base.folder), "--mlx-path", str(part)]
        command += ["--dtype", dtype, *packed]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise CourseError(
                [f"mlx_lm could not convert {base.name}", *done.stderr.strip().splitlines()[-2:]],
                "is the base a folder of plain weights, not yet quantised? choose a model of the list with --model",
            )
        file = part / "config.json"
        atomic_write_json(file, _classic(json.loads(file.read_text(encoding="utf-8"))))
    return folder


def _classic(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the names mlx-lm 0.32 reads: of those that transformers 5 writes it would silently take its own.

    SmolLM2, unpacked here, has rope_parameters.rope_theta = 100,000; mlx-lm would turn at 10,000.
    """
    rope, kinds = config.get("rope_parameters") or {}, config.get("layer_types") or []
    full, near = rope.get("full_attention", rope), rope.get("sliding_attention") or {}
    found = {"rope_theta": full.get("rope_theta"), "rope_local_base_freq": near.get("rope_theta")}
    found["rope_scaling"] = full if full.get("rope_type", "default") != "default" else None
    if "full_attention" in kinds and config["model_type"] == "gemma3_text":
        found["sliding_window_pattern"] = kinds.index("full_attention") + 1
    return config | {k: v for k, v in found.items() if v is not None}


def load_mlx(folder: Path, adapter: Path | None = None) -> Any:
    """The model in folder `folder` (MLX's form or plain safetensors), with the LoRA folder `adapter` laid over it.

    Gemma's first generation needs the tanh form of GELU, in which it was trained; mlx-lm 0.32 takes the exact one.
    """
    from mlx import nn
    from mlx_lm.models import gemma
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    gemma.MLP.__call__ = lambda mlp, x: mlp.down_proj(nn.gelu_approx(mlp.gate_proj(x)) * mlp.up_proj(x))
    model, _ = load_model(Path(folder))
    return load_adapters(model, str(adapter)).eval() if adapter else model.eval()


class _Stand:
    """Stands in for a model or its body: some attributes are ours, all others its own."""

    def __init__(self, real: Any, **own: Any) -> None:
        self.__dict__.update(own, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, *given: Any) -> Any:
        return self.call(*given)


def logits_at(model: Any, ids: Any, places: Any) -> Any:
    """float32 logits [places, vocabulary] of ids [1, tokens]: the model's own head, given only what stands there."""
    import mlx.core as mx

    body = _Stand(model.model, call=lambda inputs, *more: model.model(inputs, *more)[:, places])
    return type(model).__call__(_Stand(model, model=body), ids)[0].astype(mx.float32)


def mlx_nll(folder: Path, rows: Sequence[Rendered], adapter: Path | None = None) -> float:
    """As `nll`, in MLX: mean negative log-likelihood in nats per learned token."""
    import mlx.core as mx
    from mlx import nn

    model, total = load_mlx(folder, adapter), 0.0
    for row in rows:
        places = [i for i, m in enumerate(row.mask) if m]
        logits = logits_at(model, mx.array([row.ids]), mx.array(places) - 1)
        total += nn.losses.cross_entropy(logits, mx.array([row.ids[i] for i in places]), reduction="sum").item()
    return total / sum(sum(r.mask) for r in rows)


class Mlx(Transformers):
    """An MLX model folder, with a LoRA adapter (its `mlx/` folder) on top if one is given; greedy, one by one.

    Of several `adapters`, which must be equal in rank, layers and matrices, the one that speaks is read into the place
    of the last: memory holds one.
    """

    def __init__(
        self, folder: Path, tokenizer: Path, adapter: Path | None = None, adapters: Mapping[str, Path] | None = None
    ) -> None:
        super().__init__(folder, tokenizer, adapter, adapters)
        for each in (*self.adapters.values(), *([adapter] if adapter else ())):
            check_adapter(each, tokenizer)
        if len({str(sorted(shapes(each / MLX_FILES[1]).items())) for each in self.adapters.values()}) > 1:
            raise CourseError("these adapters differ in rank, layers or matrices", "train all of them with one recipe")
        self.speaking: str | None = next(iter(self.adapters), None)

    def load(self) -> Any:
        """The model, ready to be asked."""
        return load_mlx(self.folder, next(iter(self.adapters.values()), self.adapter))

    def speak(self, voice: str | None) -> None:
        """Let the adapter of `voice` answer from now on; None, the base alone: its lora_b are zero."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        if voice != self.speaking and voice:
            self.model.load_weights(str(self.adapters[voice] / MLX_FILES[1]), strict=False)
        elif voice != self.speaking:
            own = [(n, mx.zeros_like(t)) for n, t in tree_flatten(self.model.parameters()) if n.endswith("lora_b")]
            self.model.load_weights(own, strict=False)
        mx.eval(self.model.parameters())
        self.speaking = voice

    def generate(
        self, rows: Sequence[list[int]], stops: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[list[int], float]]:
        """(new token ids, seconds) for each row of prompt ids, in order; a stop token is the last."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        for ids in rows:
            start, new = time.perf_counter(), []
            for token, _ in generate_step(mx.array(ids), self.model, max_tokens=max_new_tokens):
                new.append(int(token))
                if new[-1] in stops:
                    break
            yield new, time.perf_counter() - start
