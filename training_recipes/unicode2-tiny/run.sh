#!/usr/bin/env bash
# Trains unicode2-tiny from scratch. Run it from the root of the repository: `run.sh [EMOJI]`, with the folder of emoji that
# training_recipes/README.md describes. Each command passes over what is finished, and resumes what was killed.
set -euo pipefail
recipes=training_recipes/unicode2-tiny
out=outputs/unicode2-tiny
emoji=${1:-$out/emoji}
stage() { accelerate launch --num_processes 1 "$@"; }
if python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
  # Glibc would return the memory of every step and fetch it again page by page: a fifth of a step's time
  export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456
  # Only CPUs with instructions for bfloat16 multiply it faster than float32
  grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && bf16=true || bf16=false
  stage() { accelerate launch --config_file training_recipes/accelerate/cpu.yaml "$@" --use_cpu true --bf16 $bf16; }
fi

unicode2 scenes --output $out/data --num-scenes 50000 --num-emoji 40000 --emoji-dir "$emoji"

# Stand-ins for what a full-size model downloads
python $recipes/stand_ins/make_llm.py --config $recipes/stand_ins/llm.yaml
stage $recipes/stand_ins/train_siglip.py --config $recipes/stand_ins/siglip.yaml
stage $recipes/stand_ins/train_vae.py --config $recipes/stand_ins/vae.yaml
stage $recipes/stand_ins/train_flux.py --config $recipes/stand_ins/flux.yaml

unicode2 codebook build --images $out/data --encoder $out/siglip --codebook-size 8192 --num-cells 64 \
  --allocation proportional --num-images 20000 --patches-per-image 24 --output $out/codebook
unicode2 init --llm $out/llm --vision $out/siglip --codebook $out/codebook --output $out/init \
  --image-generation '{"do_sample": true, "temperature": 0.6, "top_k": 0, "guidance_scale": 2.0}'
unicode2 tokenize --data $out/data --task $recipes/tasks.yaml --model $out/init --output $out/tokens
stage -m transformers_unicode2.training.sft --config $recipes/stage1.yaml
stage -m transformers_unicode2.training.sft --config $recipes/stage1.5.yaml
stage -m transformers_unicode2.training.sft --config $recipes/stage2.yaml
stage -m transformers_unicode2.training.mapper --config $recipes/mapper-flux.yaml

unicode2 assemble --model $out/stage2 --mapper $out/mapper-flux --decoder $out/flux \
  --image-size 64 --num-candidates 4 --true-cfg-scale 2.0 --steps 8 --output $out/unicode2-tiny
unicode2 evaluate scenes --model $out/unicode2-tiny --emoji-dir "$emoji" --json $out/scores.json
