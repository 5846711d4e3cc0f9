# Read by the two scripts. Their first argument, `tiny` if there is none, is a model of the hub or a
# folder; the others go on to ppo_rlhf.py. Sets $policy, $reward_model, $out, $rate (of PPO) and
# $episodes, and trains what is not there yet.
set -e
cd "$(dirname "$0")/../.."
model=${1:-tiny}
[ $# = 0 ] || shift
out=${RUNS:-runs/guides}/$model
policy=$model rate=1e-5 episodes=6400
reward_model=$out/reward-model reward_flags="--learning-rate 2e-5"
if [ "$model" = tiny ]; then
    policy=$out/policy rate=3e-4 episodes=640
    reward_flags="--train-split train[:3000]"
    if [ ! -e "$policy/summary.json" ]; then
        python examples/guides/make_tiny_gpt2.py "$out/untrained"
        python sft.py --model "$out/untrained" --train-split "train[:2000]" --epochs 1 \
            --learning-rate 3e-3 --output-dir "$policy" --overwrite
    fi
fi
if [ ! -e "$reward_model/summary.json" ]; then
    python reward_model.py --model "$policy" $reward_flags --prefix-coef 0 --lm-coef 0 \
        --eval-every 0 --output-dir "$reward_model" --overwrite
fi
