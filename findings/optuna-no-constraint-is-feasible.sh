#!/usr/bin/env bash
# optuna 5.0.0: a study in which some trials call trial.set_constraint and others never do.
# Guess: a trial that told no constraint is not known to be feasible, so best_trial leaves it out.
# Seen: it counts as feasible. A trial that returned early, before its constraint was measured, is the best one;
# so is one of an objective from before there were constraints, in a study that is resumed.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/v"
"$dir/v/bin/pip" -q install optuna==5.0.0
cat > "$dir/a.py" <<'PY'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    if trial.number == 2:
        return -5.0  # no constraint was told
    trial.set_constraint("latency", -1.0 if trial.number % 2 else 1.0)
    return x - (10.0 if trial.number % 2 == 0 else 0.0)


study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(objective, n_trials=8)
for trial in study.trials:
    print(trial.number, round(trial.value, 3), trial.constraints)
print("best trial:", study.best_trial.number, study.best_value)
assert study.best_trial.number == 2
PY
"$dir/v/bin/python" "$dir/a.py"
