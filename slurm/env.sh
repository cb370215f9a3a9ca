# What differs from one cluster to the next: all of it stands here, and nowhere else in slurm/.
#
# The job scripts read this file on the node. What sbatch must know (the first block) it reads from
# the shell that submits: `source slurm/env.sh` there, once. What is set already stays, so every
# line can be overridden for one job: `MOFO_RUNS=/scratch/runs sbatch slurm/train.sbatch ...`

# --- for sbatch, at submission; unset: what the site does by default
#export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
#export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-myproject}
#export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-1-00:00:00}

# --- paths that all nodes see
export MOFO_RUNS=${MOFO_RUNS:-$PWD/runs}            # run folders: checkpoints, metrics, exports
export MOFO_WEIGHTS=${MOFO_WEIGHTS:-$PWD/weights}   # released weights and encoders
export HF_HOME=${HF_HOME:-$PWD/.cache/huggingface}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}          # nodes reach no network

# --- scratch of the node itself, and up to 100 GiB there for shards that are read from URLs
export TMPDIR=${TMPDIR:-/tmp}
export MOFO_CACHE=${MOFO_CACHE:-$TMPDIR/mofo-$(id -u)}

# --- software: modules, then what runs a command; a container is a prefix of it
#module load cuda/12.8
PYTHON=${MOFO_PYTHON:-$PWD/.venv/bin/python}
LAUNCH=(${MOFO_LAUNCH:-})
#LAUNCH=(apptainer exec --nv --bind "$PWD,$MOFO_RUNS,$MOFO_WEIGHTS" /shared/mofo.sif)

# --- network between the nodes; unset: the libraries look for it themselves
#export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0}
#export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}

export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}        # ranks share the cores of a node
