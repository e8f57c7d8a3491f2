# The image that launch/kubernetes.yaml names: docker build -t registry.example.com/rkdo_dist:0.1.0 .
# CUDA comes with torch's wheels; for a smaller image without: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.12-slim

# A compiler: Triton builds its launcher with it. git: environment.json records the commit where there is one.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*

WORKDIR /rkdo_dist
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=train,deepspeed,object-stores,timm,parquet,tracking

# Libraries first: they change less often than the code.
COPY requirements.lock ./
RUN pip install --no-cache-dir -c requirements.lock --index-url "$TORCH_INDEX" torch torchvision
COPY pyproject.toml README.md LICENSE ./
COPY rkdo_dist ./rkdo_dist
COPY configs ./configs
COPY launch ./launch
RUN pip install --no-cache-dir -c requirements.lock ".[$EXTRAS]"

# Accelerate and Hugging Face write caches; nobody needs to be root to train.
RUN useradd --create-home trainer
USER trainer
ENV PYTHONUNBUFFERED=1
ENTRYPOINT []
CMD ["rkdo", "--help"]
