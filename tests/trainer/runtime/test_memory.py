"""A run that is out of memory prints one line with flags to try."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smpo_trainer import trainer as loop
from smpo_trainer.model.denoising_error import pair_outputs
from smpo_trainer.runtime.memory import remedies
from tests.trainer.helpers import arguments, make_settings, run_cli

RAN_OUT = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 80 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
)


def failing_after(calls: int, error: BaseException) -> object:
    count = 0

    def fail(*given: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return pair_outputs(*given)

    return fail


@pytest.mark.parametrize("error", RAN_OUT, ids=["cuda", "cublas", "cpu", "python"])
def test_one_line_names_flags_to_try(
    shards: Path,
    model: Path,
    tmp_path: Path,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "pair_outputs", failing_after(1, error))
    options = {"batch_size": 6, "grad_accum": 3, "gradient_checkpointing": True}
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **options)) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert "cpu" in said
    for flags in ("--batch-size 3 --grad-accum 6", "--dtype bf16", "--optimizer adafactor"):
        assert flags in said
    assert "--gradient-checkpointing" not in said


def test_other_errors_keep_their_traceback(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "pair_outputs", failing_after(1, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli(monkeypatch, arguments(shards, model, tmp_path / "run"))


def test_a_smaller_batch_divides_the_batch() -> None:
    given = make_settings(
        batch_size=9, grad_accum=2, gradient_checkpointing=True, reference="auto", lora_rank=4,
        dtype="bf16", optimizer="adamw",
    )  # fmt: skip
    ways = {"uses_fsdp": False, "holds_text_encoders": False}
    assert remedies(given, **ways)[0] == "--batch-size 3 --grad-accum 6"
    alone = given.replace(batch_size=1)
    assert [remedy for remedy in remedies(alone, **ways) if remedy.startswith("--")] == ["--quantize nf4"]
    assert not any(remedy.startswith("--") for remedy in remedies(alone.replace(quantize="int8"), **ways))
    assert not any("--text stored" in remedy for remedy in remedies(given, **ways))
    assert any("--text stored" in remedy for remedy in remedies(given, uses_fsdp=False, holds_text_encoders=True))


def test_with_fsdp_only_supported_flags_are_named() -> None:
    given = make_settings(dtype="bf16", optimizer="adamw")
    one, several = (remedies(given, uses_fsdp=uses_fsdp, holds_text_encoders=False) for uses_fsdp in (False, True))
    assert any("FSDP" in remedy for remedy in one)
    assert not any("FSDP" in remedy or "adafactor" in remedy for remedy in several)
    adapted = given.replace(lora_rank=4)
    assert "--quantize nf4" not in remedies(adapted, uses_fsdp=True, holds_text_encoders=False)
