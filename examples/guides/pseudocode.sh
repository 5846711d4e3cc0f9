# The PPO loop as guides print it: the mean reward as baseline, one clipped step a batch, no more.
#   sh examples/guides/pseudocode.sh          the tiny GPT-2: a minute, offline
#   sh examples/guides/pseudocode.sh gpt2
. "$(dirname "$0")/models.sh"
python ppo_rlhf.py --model "$policy" --reward-model "$reward_model" --learning-rate $rate \
    --total-episodes $episodes --batch-size 16 --advantage batch_mean --no-whiten-advantages \
    --num-ppo-epochs 1 --temperature 1 --kl-coef 0 --missing-eos-penalty 0 --max-grad-norm 1e9 \
    --output-dir "$out/pseudocode" --overwrite "$@"
