"""Names adapters as models with the openai client, and loads and unloads them as vLLM's users do.

Usage: adapters.py WINDLASS MODEL. Makes two adapters of random numbers for the model.
"""

import json
import random
import struct
import sys
import tempfile
from pathlib import Path

import openai
from server import KEY, running

RANK = 4


def adapter(folder: Path, model: Path, seed: int) -> None:
    """A LoRA of the first layer's queries, in PEFT's files."""
    config = json.loads((model / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    queries = heads * (config.get("head_dim") or width // heads)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": [RANK, width], f"{module}.lora_B.weight": [queries, RANK]}
    head, data, chance = {}, b"", random.Random(seed)
    for name, shape in shapes.items():
        count = shape[0] * shape[1]
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * count]}
        data += struct.pack(f"<{count}f", *(chance.gauss(0, 1) for _ in range(count)))
    text = json.dumps(head).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": [module.removeprefix("base_model.model.")]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for seed, name in enumerate(["rhyme", "prose"]):
            adapter(Path(place) / name, Path(sys.argv[2]), seed)
        flags = ["--adapter", f"{place}/rhyme", "--allow-adapter-loading", place]
        with running(sys.argv[1], sys.argv[2], KEY, *flags) as url:
            client = openai.OpenAI(base_url=url + "/v1", api_key=KEY)
            assert [model.id for model in client.models.list()] == ["tiny", "rhyme"]
            assert client.models.retrieve("rhyme").model_extra["parent"] == "tiny"

            def said(model: str) -> list[float]:
                asked = {"prompt": "Once there was", "max_tokens": 8, "temperature": 0, "logprobs": 0}
                answer = client.completions.create(model=model, **asked)
                assert answer.model == model
                return answer.choices[0].logprobs.token_logprobs

            def post(verb: str, body: dict[str, str]) -> str:
                return client.post(f"/{verb}_lora_adapter", body=body, cast_to=str)

            loaded = post("load", {"lora_name": "verse", "lora_path": "prose"})
            assert loaded == "Success: LoRA adapter 'verse' added successfully.", loaded
            answers = [said(model) for model in ["tiny", "rhyme", "verse"]]
            assert all(answers.count(answer) == 1 for answer in answers), answers
            post("unload", {"lora_name": "verse"})
            try:
                said("verse")
            except openai.NotFoundError as error:
                assert error.code == "model_not_found" and error.param == "model"
            else:
                sys.exit("an adapter that was unloaded answers")
            assert said("rhyme") == answers[1]
    print(f"adapters: as the openai client {openai.__version__} has it")


if __name__ == "__main__":
    main()
