"""Copies what reads and writes codes, the projector and the visual head, from one UniCode² checkpoint to another whose codes lie in
nearly the same feature space, as after more training of the same SigLIP.

    python training_recipes/unicode2-tiny/carry_over.py --start hub_configs/unicode2-tiny --checkpoint outputs/unicode2-tiny/init
"""

import argparse


def main(args: argparse.Namespace) -> None:
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    from transformers_unicode2.files import whole_file

    start = load_file(f"{args.start}/model.safetensors")
    carried = []
    for path in sorted(Path(args.checkpoint).glob("model*.safetensors")):
        weights = load_file(path)
        for name in weights:
            if name.startswith(("model.projector.", "visual_head.")):
                weights[name] = start[name].to(weights[name].dtype)
                carried.append(name)
        with whole_file(path) as file:
            save_file(weights, file, {"format": "pt"})
    print(f"{args.checkpoint}: {len(carried)} tensors carried over from {args.start}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--start", required=True)
    parser.add_argument("--checkpoint", required=True)
    main(parser.parse_args())
