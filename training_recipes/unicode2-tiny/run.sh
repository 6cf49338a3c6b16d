#!/usr/bin/env bash
# Trains unicode2-tiny: run it from the root of the repository, as `run.sh [EMOJI [START [language | mapper | decoder]]]`. Stages that are done are skipped,
# one that was killed goes on from its last checkpoint. Emoji: training_recipes/README.md. Without START all of it learns from nothing; with
# a checkpoint as START, its parts go on learning, or its language model, its mapper or its FLUX alone, on new scenes.
set -euo pipefail
recipes=training_recipes/unicode2-tiny
out=outputs/unicode2-tiny
emoji=${1:-$out/emoji}
start=${2:+$(realpath -m "$2")}
part=${3:-all}
case $part in all | language | mapper | decoder) ;; *) echo "The third argument is $part; it must be all, language, mapper or decoder." >&2; exit 2 ;; esac
if [ "$part" != all ] && [ -z "$start" ]; then echo "$part needs START, a checkpoint." >&2; exit 2; fi
if [ -n "$start" ]; then
  for file in config.json model_index.json condition_mapper/config.json transformer/config.json; do
    [ -f "$start/$file" ] || { echo "START $start has no $file; it must be an assembled checkpoint." >&2; exit 2; }
  done
fi
begun=$out/.start-$part
if [ -f "$begun" ] && [ "$(< "$begun")" != "$start" ]; then
  echo "$out was begun with START '$(< "$begun")', not '$start'; move $out away." >&2
  exit 2
fi
model=$out/unicode2-tiny
[ "$part" = all ] || model+=-$part
faster_in_bfloat16() {
  python - << 'END'
import torch
from torch.utils.benchmark import Timer

seconds = {}
for dtype in (torch.float32, torch.bfloat16):
    x, y = torch.randn(4096, 256, dtype=dtype), torch.randn(256, 768, dtype=dtype)
    seconds[dtype] = Timer("x @ y", globals={"x": x, "y": y}).blocked_autorange(min_run_time=1).median
print(str(seconds[torch.bfloat16] < seconds[torch.float32]).lower())
END
}
mkdir -p "$out"
echo "$start" > "$begun"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  launch() { accelerate launch --num_processes 1 "$@"; }
else
  # glibc would hand the memory of every step back and fetch it again page by page: a fifth of a step's time
  export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456
  # CPUs differ in whether they multiply bfloat16 or float32 faster; what was found is kept, for a run that goes on
  [ -f $out/.bf16 ] || { faster_in_bfloat16 > $out/.bf16.tmp && mv $out/.bf16.tmp $out/.bf16; }
  launch() { accelerate launch --config_file training_recipes/accelerate/cpu.yaml "$@" --use_cpu true --bf16 "$(< $out/.bf16)"; }
fi
guidance() { # of the FLUX of START
  python -c 'import json, sys; print(json.load(open(sys.argv[1])).get("true_cfg_scale", 1.0))' "$start/model_index.json"
}
steps() { [ -z "$start" ] || echo "--max_steps $1"; } # of a stage that goes on from START
once() { # NAME COMMAND...: runs a stage unless it has finished
  local mark=$out/.done-$1
  shift
  [ -f "$mark" ] || { "$@" && touch "$mark"; }
}
codes() {
  once codebook unicode2 codebook build --images $out/data --encoder $out/siglip --codebook-size 8192 --num-cells 64 \
    --allocation proportional --num-images 20000 --patches-per-image 24 --output $out/codebook
  once init unicode2 init --llm $out/llm --vision $out/siglip --codebook $out/codebook --output $out/init \
    --image-generation '{"do_sample": true, "temperature": 0.6, "top_k": 0, "guidance_scale": 2.0}'
  [ -z "$start" ] || once carry-over python $recipes/carry_over.py --start "$start" --checkpoint $out/init
  once tokens unicode2 tokenize --data $out/data --model $out/init --output $out/tokens
}
decoder() {
  if [ -n "$start" ]; then
    once vae cp -rT "$start/vae" $out/vae
  else
    once vae launch $recipes/train_vae.py --config $recipes/vae.yaml
  fi
  once flux launch $recipes/train_flux.py --config $recipes/flux.yaml ${start:+--start "$start"} $(steps 2400)
  once mapper launch -m transformers_unicode2.training.mapper --config $recipes/mapper-flux.yaml $(steps 1400)
}
language_model() {
  once stage1 launch -m transformers_unicode2.training.sft --config $recipes/stage1.yaml $(steps 100)
  once stage1.5 launch -m transformers_unicode2.training.sft --config $recipes/stage1.5.yaml $(steps 600)
  once stage2 launch -m transformers_unicode2.training.sft --config $recipes/stage2.yaml $(steps 1760)
}
both() { # the decoder and its mapper, in the background, and the language model; each has half of the cores
  local threads=${OMP_NUM_THREADS:-}
  export OMP_NUM_THREADS=$((($(python -c 'import os; print(os.cpu_count())') + 1) / 2))
  echo "The decoder trains at the same time; its progress is in $out/decoder.log."
  set -m # gives the job a process group, so that it can be ended as a whole
  decoder > $out/decoder.log 2>&1 &
  job=$!
  set +m
  language_model
  wait $job || { tail -n 20 $out/decoder.log; exit 1; }
  job=
  if [ -n "$threads" ]; then export OMP_NUM_THREADS=$threads; else unset OMP_NUM_THREADS; fi
}
more_language() { # C1 and C2 rest, and so mapper and decoder stay valid
  once data-language unicode2 scenes --output $out/data-language --seed 5 --num-scenes 60000 --num-emoji 60000 --photo-share 0.2 \
    --emoji-dir "$emoji"
  once tokens-language unicode2 tokenize --data $out/data-language --model "$start" --output $out/tokens-language
  once stage2-language launch -m transformers_unicode2.training.sft --config $recipes/stage2.yaml --model "$start" \
    --data $out/tokens-language --output_dir $out/stage2-language --max_steps 3900 --warmup_steps 50 \
    --train_modules projector language_model lm_head visual_head
  once assemble-language unicode2 assemble --model $out/stage2-language --mapper "$start/condition_mapper" --decoder "$start" \
    --image-size 64 --num-candidates 4 --true-cfg-scale "$(guidance)" --output $model
}
mostly_emoji() { # whose details the codes keep least of
  once data-emoji unicode2 scenes --output $out/data-emoji --seed 6 --num-scenes 20000 --num-emoji 120000 --photo-share 0.2 \
    --emoji-dir "$emoji"
}
more_mapper() { # codes, language model and decoder stay as they are
  mostly_emoji
  once tokens-emoji unicode2 tokenize --data $out/data-emoji --model "$start" --output $out/tokens-emoji
  once mapper-codes launch -m transformers_unicode2.training.mapper --config $recipes/mapper-codes.yaml --model "$start" \
    --start "$start/condition_mapper"
  once assemble-mapper unicode2 assemble --model "$start" --mapper $out/mapper-codes --decoder "$start" \
    --image-size 64 --num-candidates 4 --true-cfg-scale "$(guidance)" --output $model
}
more_decoder() { # all but the FLUX transformer and the shift of its scheduler stays as it is
  mostly_emoji
  once flux-coarse launch $recipes/tune_flux.py --config $recipes/flux-coarse.yaml --model "$start"
  once assemble-decoder unicode2 assemble --model "$start" --mapper "$start/condition_mapper" --decoder $out/flux-coarse \
    --image-size 64 --num-candidates 4 --true-cfg-scale 2.0 --output $model
}
job=
trap '[ -z "$job" ] || kill -- -$job 2> /dev/null || true' EXIT
if [ "$part" != all ]; then
  "more_$part"
else
  once data unicode2 scenes --output $out/data --num-scenes 50000 --num-emoji 40000 --emoji-dir "$emoji"
  once llm python $recipes/make_llm.py --config $recipes/llm.yaml ${start:+--start "$start"}
  once siglip launch $recipes/train_siglip.py --config $recipes/siglip.yaml ${start:+--start "$start"} $(steps 1300)
  codes
  both
  once assemble unicode2 assemble --model $out/stage2 --mapper $out/mapper-flux --decoder $out/flux \
    --image-size 64 --num-candidates 4 --true-cfg-scale 2.0 --output $model
fi
unicode2 evaluate scenes --model $model --emoji-dir "$emoji" --json $model.json
