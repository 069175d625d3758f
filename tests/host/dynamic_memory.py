"""What loading gives while the host manages memory dynamically; runs in the host's own Python.

Arguments: the repository, the host's folder, a MODEL file, a damaged one, a T5, a ControlNet, and
JSON of {name: LoRA} and of GGUF files {"model": ..., "t5": ...}, the latter empty without gguf.
The last line of the output is a JSON object of what was found; see test_dynamic_memory.py.

Dynamic memory management needs a graphics card, so a CPU shows it in two parts: "layers" has the
host's layers, empty until they are loaded, and its own patcher class, which steps aside on a CPU;
"patcher" has a plain patcher that calls itself dynamic, which makes the host and the loaders go
the way of a dynamic one. That leaves the weights in the file's dtype, so it loads in that one.
"""

import importlib.util
import json
import sys

REPOSITORY, HOST, MODEL, DAMAGED, T5, CONTROL = sys.argv[1:7]
LORAS, PACKED = map(json.loads, sys.argv[7:])
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, HOST)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def import_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "pack", f"{REPOSITORY}/__init__.py", submodule_search_locations=[REPOSITORY])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])


def weights_differ(loaded: dict, file: dict) -> list[str]:
    """Names on one side alone, and those whose values are not the file's in the loaded dtype."""
    return sorted(set(loaded) ^ set(file)) + [
        name for name in set(loaded) & set(file)
        if not torch.equal(loaded[name], file[name].to(loaded[name].dtype))]


def output(patcher: object, control: object = None) -> torch.Tensor:
    import comfy.model_management
    from pack.nodes.host.transformer import Controls
    from pack.pixart_core.model import Control

    comfy.model_management.load_models_gpu([patcher, *([control.patcher] if control else [])])
    generator = torch.Generator().manual_seed(0)
    width = patcher.model.pixart_config.caption_channels
    x = torch.randn(2, 4, 6, 8, generator=generator)
    caption = torch.randn(2, 5, width, generator=generator)
    steered = Controls([Control(control.network, x[:1])]) if control else None
    # as PixArtModel.extra_conds passes them
    size = {"image_size": torch.tensor([[48, 64]] * 2, dtype=torch.int32),
            "aspect_ratio": torch.full((2, 1), 0.75).view(torch.int32)}
    with torch.inference_mode():
        return patcher.model.apply_model(x, torch.tensor([1.5, 0.3]), c_crossattn=caption,
                                         control=steered, transformer_options={}, **size)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def states(clip: object) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("a red circle on blue"))


def patched_outputs(load_model: object, load_clip: object, dtype: torch.dtype) -> dict:
    """What MODELs and CLIPs give with each LoRA and from GGUF files; a LoRA changes no other."""
    from pack.nodes.host.lora import apply_lora, load_lora

    def with_lora(model: object, path: str) -> torch.Tensor:
        return output(apply_lora(model, load_lora(path), 1.0)[0])

    model = load_model(MODEL, dtype, None, False)
    found = {"bare": output(model)}
    found |= {name: with_lora(model, path) for name, path in LORAS.items()}
    found["bare again"] = output(model)
    if PACKED:
        model = load_model(PACKED["model"], dtype, None, False)
        found["packed"] = output(model)
        found["packed lora"] = with_lora(model, LORAS["lora"])
        found["packed t5"] = states(load_clip(PACKED["t5"]))
    return found


def look(load_model: object, load_clip: object, load_control: object, dtype: torch.dtype,
         plain: dict) -> dict:
    import comfy.model_management

    control = load_control(CONTROL, dtype)
    model, clip = load_model(MODEL, dtype, None, False), load_clip(T5)
    model_file, t5_file = load_file(MODEL), load_file(T5)
    model_file.pop("pos_embed", None), t5_file.pop("spiece_model")  # no weights
    found = {
        "is_dynamic": [model.is_dynamic(), clip.patcher.is_dynamic()],
        "model_weights": weights_differ(model.model.diffusion_model.state_dict(), model_file),
        "clip_weights": weights_differ(clip.cond_stage_model.t5xxl.transformer.state_dict(),
                                       t5_file),
        "same_output": torch.equal(output(model), plain[dtype]),
        "control_weights": weights_differ(control.network.state_dict(), load_file(CONTROL)),
        "same_steered": torch.equal(output(model, control), plain[dtype, "steered"]),
        "same_states": torch.equal(states(clip), plain["states"]),
        "tables": [len(model.model.diffusion_model._position_tables)],
    }
    comfy.model_management.unload_all_models()
    found["tables"].append(len(model.model.diffusion_model._position_tables))
    still = clip.clone(disable_dynamic=True)
    found["clones"] = [model.clone(disable_dynamic=True).is_dynamic(), still.patcher.is_dynamic()]
    still.cond_stage_model = still.patcher.model
    found["clone_states"] = torch.equal(states(still), plain["states"])
    try:
        load_model(DAMAGED, dtype, None, False)
        found["damaged"] = "loaded"
    except ValueError as error:
        found["damaged"] = str(error)
    return found


def main() -> None:
    import_pack()
    import comfy.memory_management
    import comfy.model_patcher
    from pack.nodes.host.clip import load_clip
    from pack.nodes.host.control import load_control
    from pack.nodes.host.model import load_model

    class CallsItselfDynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

    lanes = {"layers": (comfy.model_patcher.ModelPatcherDynamic, torch.bfloat16),
             "patcher": (CallsItselfDynamic, torch.float16)}
    plain = {dtype: output(load_model(MODEL, dtype)) for _, dtype in lanes.values()}
    for _, dtype in lanes.values():
        plain[dtype, "steered"] = output(load_model(MODEL, dtype), load_control(CONTROL, dtype))
    plain["states"] = states(load_clip(T5))
    patched = {dtype: patched_outputs(load_model, load_clip, dtype) for _, dtype in lanes.values()}
    comfy.memory_management.aimdo_enabled = True
    found = {"effects": {name: [relative(out[name], out[base]) for out in patched.values()]
                         for name, base in [*((name, "bare") for name in LORAS),
                                            *([("packed lora", "packed")] if PACKED else [])]}}
    for name, (patcher, dtype) in lanes.items():
        comfy.model_patcher.CoreModelPatcher = patcher
        found[name] = look(load_model, load_clip, load_control, dtype, plain)
        found[name]["patched"] = {
            key: relative(value, patched[dtype][key])
            for key, value in patched_outputs(load_model, load_clip, dtype).items()}
    print(json.dumps(found))


main()
