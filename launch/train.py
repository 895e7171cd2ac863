"""What the deepspeed runner starts: `deepspeed --num_gpus 2 launch/train.py --config debug --data shards/train`.

Also for torchrun, srun and mpirun, and by itself as a run of one rank. All options are those of `lumina train`.
"""

from lumina_ds.cli.train import main

if __name__ == "__main__":
    main()
