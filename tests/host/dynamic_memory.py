"""What loading gives while the host manages memory dynamically; runs in the host's own Python.

Arguments: the repository, the host's folder, a MODEL file, a damaged one, a T5 and a ControlNet.
The last line of the output is a JSON object of what was found; see test_dynamic_memory.py.

Dynamic memory management needs a graphics card, so a CPU shows it in two parts: "layers" has the
host's layers, empty until they are loaded, and its own patcher class, which steps aside on a CPU;
"patcher" has a plain patcher that calls itself dynamic, which makes the host and the loaders go
the way of a dynamic one. That leaves the weights in the file's dtype, so it loads in that one.
"""

import importlib.util
import json
import sys

REPOSITORY, HOST, MODEL, DAMAGED, T5, CONTROL = sys.argv[1:]
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
    with torch.inference_mode():
        return patcher.model.apply_model(x, torch.tensor([1.5, 0.3]), c_crossattn=caption,
                                         control=steered, transformer_options={})


def states(clip: object) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("a red circle on blue"))


def look(load_model: object, load_clip: object, load_control: object, dtype: torch.dtype,
         plain: dict) -> dict:
    import comfy.model_management

    control = load_control(CONTROL, dtype)
    model, clip = load_model(MODEL, dtype, None, False), load_clip(T5)
    model_file, t5_file = load_file(MODEL), load_file(T5)
    model_file.pop("pos_embed"), t5_file.pop("spiece_model")  # no weights
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
    comfy.memory_management.aimdo_enabled = True
    found = {}
    for name, (patcher, dtype) in lanes.items():
        comfy.model_patcher.CoreModelPatcher = patcher
        found[name] = look(load_model, load_clip, load_control, dtype, plain)
    print(json.dumps(found))


main()
