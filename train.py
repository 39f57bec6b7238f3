"""Align a language model: fit, validate, test or predict with a configuration.

python train.py fit --config configs/quickstart.yaml
python train.py fit --config configs/dpo.yaml --config configs/overlays/lora.yaml --model.beta=0.2
python train.py fit --config configs/dpo.yaml --reference_refresh.alpha=0.6 --reference_refresh.tau=1
python train.py fit --config configs/dpo.yaml --reference_refresh=null   # the reference does not move
python train.py fit --config configs/dpo.yaml --print_config             # print the merged YAML and exit
python train.py fit --model.help=DPO                                     # the options of an objective
"""

from lit_align.cli import main

if __name__ == "__main__":
    main()
