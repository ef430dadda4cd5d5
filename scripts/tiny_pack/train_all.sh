#!/usr/bin/env bash
# Train the whole pack on one GPU: the autoencoders and CLIP first, then all that needs them, side by side.
# Usage: scripts/tiny_pack/train_all.sh PACK_FOLDER WORK_FOLDER   (logs go to WORK_FOLDER/*.log)
set -u
pack=$1 work=$2
python=${PYTHON:-python3}
mkdir -p "$pack" "$work"
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
train() { # minutes, log name, module and its arguments
  local minutes=$1 log=$2
  shift 2
  "$python" -m "scripts.tiny_pack.$1" "${@:2}" --pack "$pack" --work "$work" --minutes "$minutes" >"$work/$log.log" 2>&1 ||
    echo "FAILED: $log" >>"$work/failed.txt"
}
train "${VAE_MINUTES:-4}" vae_flux train_vae flux &
vae_flux=$!
train "${VAE_MINUTES:-4}" vae_mvdream train_vae mvdream &
vae_mvdream=$!
train "${CLIP_MINUTES:-6}" clip train_clip &
clip=$!
wait $vae_mvdream $clip # both image models read CLIP's tokenizer, and FLUX its text tower
train "${MVDREAM_MINUTES:-12}" mvdream train_mvdream &
wait $vae_flux
train "${FLUX_MINUTES:-11}" flux train_flux &
train "${SMALL_MINUTES:-3}" judge judge &
train "${SMALL_MINUTES:-3}" background train_background &
wait
# LGM learns from views that the others draw. On a GPU it and the results need gsplat's build (scripts.ops.build_gsplat).
train "${LGM_MINUTES:-10}" lgm train_lgm
# The quality net learns from results of the finished pack.
"$python" -m scripts.tiny_pack.results --work "$work" --minutes "${RESULTS_MINUTES:-4}" --workers "${WORKERS:-4}" \
  >"$work/results.log" 2>&1 || echo "FAILED: results" >>"$work/failed.txt"
train "${QUALITY_MINUTES:-5}" quality train_quality
echo "all done" >"$work/done.txt"
