"""Align a language model.

python train.py fit --config configs/quickstart.yaml                       # train; also validate, test, predict
python train.py fit --config configs/dpo.yaml --config configs/overlays/lora.yaml --model.beta=0.2
python train.py fit --config configs/dpo.yaml --reference_refresh.alpha=0.6 --reference_refresh.tau=512
python train.py fit --config configs/dpo.yaml --reference_refresh=null     # the reference stays where it is
python train.py fit --config configs/dpo.yaml --print_config               # the merged configuration, nothing run
python train.py fit --model.help=DPO                                       # an objective's options
"""

from lit_align.cli import main

if __name__ == "__main__":
    main()
