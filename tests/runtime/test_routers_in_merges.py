"""What a merge says and records of its routers, and that they route: gate mode ridge from the config to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from raymoe.planning import MergeOptions
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.verify import verify_merge
from tests.architectures.pairs import load_merged, moe_blocks
from tests.cli.commands import finished_shards, hashes, raymoe, start, wait_until, write_config
from tests.pico import LAYERS, merge_config, merge_without_ray, save_lora
from tests.runtime.conftest import kill
from tests.runtime.in_process import in_this_process

Run = Callable[..., Any]
LINE = re.compile(
    r"routers on held-out prompts: (\d+)% of tokens routed to their expert first \(chance 33%\); "
    r"weakest: layer 0 \d+%, layer 1 \d+%, layer 2 \d+%"
)


def prompts_of(letter: str, seed: int) -> list[str]:
    """Prompts whose words all begin with that letter."""
    numbers = np.random.default_rng(seed).integers(0, 500, (8, 12))
    return [" ".join(f"{letter}{word}" for word in row) for row in numbers.tolist()]


def config_with(zoo: Callable[..., Path], letters: str, mode: str = "ridge", **options: Any) -> dict[str, Any]:
    experts = [zoo("llama", seed=seed) for seed in range(1, len(letters) + 1)]
    config = merge_config(zoo("llama"), experts, mode=mode, **options)
    for number, (expert, letter) in enumerate(zip(config["experts"], letters, strict=True)):
        if mode != "random":
            expert["positive_prompts"] = prompts_of(letter, number)
    return config


@pytest.fixture(scope="module")
def finished(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    config = write_config(folder / "config.yaml", config_with(zoo, "qwz"))
    with in_this_process():
        done = raymoe("merge", config, folder / "out")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr)
    return folder


def test_a_merge_says_how_its_routers_do(finished: Path) -> None:
    said = (finished / "said").read_text()
    found = LINE.search(said)
    assert found is not None, said
    assert int(found[1]) > 80
    assert re.search(r"first choices by expert: (expert \d \(llama-\d+\) \d+%(, )?){3}\n", said)
    assert "warning" not in said


def test_the_record_holds_what_it_said(finished: Path) -> None:
    routers = json.loads((finished / "out/raymoe.json").read_text())["routers"]
    found = LINE.search((finished / "said").read_text())
    assert found is not None and round(100 * routers["accuracy"]) == int(found[1])
    assert [layer["layer"] for layer in routers["layers"]] == [0, 1, 2]
    for layer in routers["layers"]:
        assert layer.keys() == {"layer", "accuracy", "load", "lambda", "scale"}
        assert sum(layer["load"]) == pytest.approx(1.0, abs=1e-3)
        assert layer["accuracy"] > 0.6 and 1e-5 <= layer["lambda"] <= 1 <= layer["scale"] <= 64


@torch.inference_mode()
def test_the_merged_model_routes_prompts_to_their_experts(finished: Path) -> None:
    """In layer 0, whose inputs are the very states that its router was fitted to."""
    model = load_merged(finished / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "out")
    seen: list[torch.Tensor] = []
    block = moe_blocks(model)[0]
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0] @ block.gate.weight.T))
    for number, letter in enumerate("qwz"):
        for prompt in prompts_of(letter, number):
            model(tokenizer("<s>" + prompt, return_tensors="pt", add_special_tokens=False)["input_ids"])
        first = torch.cat([scores[1:] for scores in seen]).argmax(dim=1)
        assert (first == number).float().mean() > 0.9
        seen.clear()


def test_verify_makes_the_routers_anew(finished: Path, without_ray: None) -> None:
    done = raymoe("verify", finished / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"verified: \d+ tensors equal", done.stdout + done.stderr)


def test_a_merge_killed_while_prompts_are_read_goes_on(
    finished: Path, ray_env: dict[str, str], without_ray: None, tmp_path: Path
) -> None:
    """The command is killed on a cluster; what is left is done in this process."""
    config, out = finished / "config.yaml", tmp_path / "out"
    process = start("merge", config, out, "--actors", "1", env=ray_env)
    wait_until(lambda: finished_shards(out), "the first shard", [process])
    kill(process)
    process.communicate()
    done = raymoe("merge", config, out)
    assert done.returncode == 0, done.stderr
    assert LINE.search(done.stderr)
    assert hashes(out) == hashes(finished / "out")


def test_random_routers_are_not_judged(zoo: Callable[..., Path], merge_in_process: Run, tmp_path: Path) -> None:
    result = merge_in_process(config_with(zoo, "qwz", mode="random"), tmp_path / "out", MergeOptions(model_card=False))
    assert result.router_lines == ()
    assert json.loads((tmp_path / "out/raymoe.json").read_text())["routers"] is None


def test_one_prompt_an_expert_is_merged_and_not_judged(
    zoo: Callable[..., Path], merge_in_process: Run, tmp_path: Path
) -> None:
    config = config_with(zoo, "qwz")
    for expert in config["experts"]:
        del expert["positive_prompts"][1:]
    result = merge_in_process(config, tmp_path / "out")
    assert result.router_lines == ()
    (warning,) = result.warnings
    assert warning.startswith("few prompts (expert 0 has 1, expert 1 has 1, expert 2 has 1): ")
    assert "no prompt can be held out" in warning
    assert json.loads((tmp_path / "out/raymoe.json").read_text())["routers"] is None


def test_modes_that_sum_are_judged_in_the_layers_that_they_run(
    zoo: Callable[..., Path], merge_in_process: Run, tmp_path: Path
) -> None:
    """Experts 0 and 1 have the same prompts: the first of equal scores wins, and the other is warned of."""
    config = config_with(zoo, "qqz", mode="hidden_avg")
    config["experts"][1]["positive_prompts"] = config["experts"][0]["positive_prompts"]
    result = merge_in_process(config, tmp_path / "out")
    routers = json.loads((tmp_path / "out/raymoe.json").read_text())["routers"]
    assert [layer["layer"] for layer in routers["layers"]] == list(range(LAYERS - 1))
    assert all(layer.keys() == {"layer", "accuracy", "load"} and layer["load"][1] == 0 for layer in routers["layers"])
    (starved,) = (warning for warning in result.warnings if "starved" in warning)
    assert re.match(
        r"expert 1 \(llama-\d+\) will be starved: .* in 2 of 2 layers \(0-1\); .* gate_mode: ridge$", starved
    )
    assert len(result.router_lines) == 2


def test_prompts_of_one_kind_are_warned_of(zoo: Callable[..., Path], merge_in_process: Run, tmp_path: Path) -> None:
    """Nothing tells whose they are, where one model reads them all; nor is the mode that one has a remedy."""
    result = merge_in_process(config_with(zoo, "kkk", prompt_model="base"), tmp_path / "out")
    (warning,) = (warning for warning in result.warnings if "hardly tell" in warning)
    assert re.match(
        r"the routers hardly tell the experts' prompts apart: \d\d% of .* and 33% would by chance; ", warning
    )
    assert "ridge" not in warning


def test_a_lora_a_gated_shared_expert_and_negative_prompts(
    zoo: Callable[..., Path], merge_in_process: Run, tmp_path: Path
) -> None:
    base = zoo("qwen2")
    adapter = save_lora(tmp_path / "lora", base, ["gate_proj", "down_proj"])
    config = merge_config(
        base,
        [f"{base}+{adapter}", zoo("qwen2", seed=1)],
        mode="ridge",
        shared=zoo("qwen2", seed=2),
        shared_prompts=True,
    )
    for number, expert in enumerate((*config["experts"], *config["shared_experts"])):
        expert["positive_prompts"] = prompts_of("qwz"[number], number)
        expert["negative_prompts"] = prompts_of("j", 9)
    result = merge_in_process(config, tmp_path / "out")
    assert "chance 50%" in result.router_lines[0]
    blocks = moe_blocks(load_merged(tmp_path / "out"))
    for block in blocks:
        assert block.gate.weight.shape == (2, 64) and block.shared_expert_gate.weight.shape == (1, 64)
        assert block.gate.weight.norm() > 0.1 and block.shared_expert_gate.weight.norm() > 0.1


def test_a_merged_backbone_is_written_said_and_verified(
    zoo: Callable[..., Path], merge_in_process: Run, tmp_path: Path
) -> None:
    """With routers that see it: the weights are those of the plan's parts. test_determinism.py has one on Ray."""
    config = {**config_with(zoo, "qw"), "backbone": {"method": "ties", "density": 0.4}}
    result = merge_in_process(config, tmp_path / "out")
    (line,) = result.backbone_lines
    assert line.startswith("Backbone: Attention, norms and embeddings are merged by TIES from 2 experts.")
    plan = merge_without_ray(config, tmp_path / "here")
    for shard in plan.worker_shards:
        assert (tmp_path / "out" / shard.file_name).read_bytes() == (tmp_path / "here" / shard.file_name).read_bytes()
    assert verify_merge(tmp_path / "out", RuntimeSettings(verbosity=-1, actors=1)).ok
    record = json.loads((tmp_path / "out/raymoe.json").read_text())
    assert record["config"]["backbone"] == {"method": "ties", "density": 0.4}
