# An image for machines that train and label: the locked environments lie where kdcloud's bootstrap looks for them, so
# that a machine made from it fetches no packages. How to build and use it: docs/image.md.
#
#     docker build -t kdcloud-machine .                    # both environments, about 16 GB
#     docker build -t kdcloud-train --target train .       # what trains, evaluates and exports, about 6 GB
#     docker build -t kdcloud-label --target label .       # what labels with vLLM, about 11 GB
#
# CUDA itself comes with the packages; the base gives the container its rights to the GPU (NVIDIA drivers from 580 on).
FROM nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:f8ef28f579ea42a44b415d2c5d46f788e6a9b395c6c83f2929416e1fc192c143 AS machine
LABEL org.opencontainers.image.title="kdcloud machine" org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Python with its headers and a compiler: Triton and vLLM compile on the way. The rest is what SkyPilot installs into a
# container by itself otherwise, at every start. No versions: the base's digest fixes the release, and fixes are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates curl fuse g++ gcc git libc6-dev netcat-openbsd openssh-server patch procps \
        python3 python3-dev python3-pip python3-venv rsync socat sudo wget \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
# root, as SkyPilot and RunPod want it: it installs packages and starts sshd in there. What runs is kdcloud's code alone.
WORKDIR /root
COPY tasks/__init__.py tasks/bootstrap.py /opt/kdcloud/tasks/
COPY scripts/lay_environments.py /opt/kdcloud/scripts/
ENV UV_NO_CACHE=1 UV_LINK_MODE=copy

FROM machine AS label
COPY requirements/label.txt /opt/kdcloud/requirements/
RUN python3 /opt/kdcloud/scripts/lay_environments.py label

FROM machine AS train
COPY requirements/train.txt /opt/kdcloud/requirements/
RUN python3 /opt/kdcloud/scripts/lay_environments.py train

FROM train AS both
COPY requirements/label.txt /opt/kdcloud/requirements/
RUN python3 /opt/kdcloud/scripts/lay_environments.py label
