"""Train a SiT with representation alignment.

    accelerate launch examples/train_srepa.py --config examples/configs/sit-xl-2_256_srepa-mse.yaml \
        --data.dataset ILSVRC/imagenet-1k --output_dir runs/xl

`--help` lists every option. Options come from YAML files (`--config`, repeatable, later files win) and from the
command line, which wins over files; `--print_config` shows the whole configuration that results. Where the package is
installed, `accelerate launch -m diffusers_srepa.cli train` is the same run.
"""

from diffusers_srepa import Trainer, parse_training_config, training_exit_codes


def main() -> None:
    """Parse, build, train."""
    config = parse_training_config()
    # Messages on the console, and exit codes: 75 for a run that has saved and can be resumed, 1 after an error, which
    # is one sentence instead of a traceback.
    with training_exit_codes(config):
        Trainer(config).train()


if __name__ == "__main__":
    main()
