"""A script, run by path: load a LoRA adapter with PEFT and save the model's outputs.

Nothing of this package can be imported here: it proves that the adapter does without.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Run the job given as JSON on the command line."""
    job = json.loads(sys.argv[1])
    if "pacatune" in sys.modules:
        raise RuntimeError("pacatune is imported when Python starts, so this would prove nothing")
    sys.modules["pacatune"] = None  # type: ignore[assignment]
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    options = job["options"]
    if job["quantization"]:
        config = transformers.BitsAndBytesConfig.from_dict(job["quantization"])
        options |= {"quantization_config": config, "device_map": {"": "cpu"}}
    model = getattr(transformers, job["model_class"]).from_pretrained(
        job["base"], dtype=torch.float32, trust_remote_code=False, **options
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes computes in bfloat16, which hides smaller errors.
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, job["adapter"]).eval()
    outputs = {}
    scratch = Path(job["scratch"])
    for number in range(job["num_batches"]):
        with torch.no_grad():
            result = model(**load_file(scratch / f"input-{number}.safetensors"))
        logits = result.get("logits")
        outputs[str(number)] = (result[0] if logits is None else logits).contiguous()
    save_file(outputs, scratch / "outputs.safetensors")


if __name__ == "__main__":
    main()
