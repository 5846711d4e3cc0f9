# What a short script for TRL's PPOTrainer does: GPT-2, batches of 16, 4 epochs, at most 50 tokens.
# First the length is the reward, then the score of a trained reward model.
#   sh examples/guides/trl.sh          the tiny GPT-2: a minute, offline
#   sh examples/guides/trl.sh gpt2
. "$(dirname "$0")/models.sh"
ppo() {
    python ppo_rlhf.py --model "$policy" --learning-rate $rate --total-episodes $episodes \
        --batch-size 16 --num-ppo-epochs 4 --response-length 50 --temperature 1 --kl-coef 0.2 \
        --kl-target 6 --missing-eos-penalty 0 --overwrite "$@"
}
length=examples/guides/length.py:length
ppo --reward-fn $length --eval-reward-fn $length --output-dir "$out/length" "$@"
ppo --reward-model "$reward_model" --output-dir "$out/score" "$@"
