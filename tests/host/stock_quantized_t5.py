"""ComfyUI's own loader on our quantised T5 files; runs in the host's own Python.

Arguments: the host's folder, JSON of {method: file}, a folder for the states. The last line of the
output is a JSON object: the token ids, and how many weights of each file stayed quantised.
"""

import json
import sys

HOST, FILES, OUT = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, HOST)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import torch  # noqa: E402

NARROW = {"d_model": 64, "d_kv": 16, "num_heads": 4}
found = {}
for method, file in FILES.items():
    clip = comfy.sd.load_clip([file], clip_type=comfy.sd.CLIPType.PIXART,
                              model_options={"t5xxl_model_config": NARROW})
    tokens = clip.tokenize("a red fox in the snow")
    with torch.no_grad():
        states = clip.encode_from_tokens(tokens)
    torch.save(states, f"{OUT}/{method}.pt")
    found["ids"] = [token for token, _ in tokens["t5xxl"][0]]
    layers = [m for m in clip.cond_stage_model.modules() if getattr(m, "quant_format", None)]
    found[method] = {"quantized": len(layers)}
print(json.dumps(found))
