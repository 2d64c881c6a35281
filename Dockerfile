# Pinned to a digest by whoever builds: see .env.example.
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE}

# bitsandbytes and torch bring their own CUDA libraries; the host gives the driver alone.
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1

RUN useradd --create-home --uid 1000 qbatch \
    && install --directory --owner qbatch --group qbatch /storage

# The dependencies are gigabytes and change seldom: they have a layer of their own, below the code.
WORKDIR /build
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['eval'], sep='\n')" \
        > requirements.txt \
    && python -m pip install --constraint constraints.txt --requirement requirements.txt

COPY . .
RUN python -m pip install --no-deps . && rm -rf /build/*

USER qbatch
WORKDIR /home/qbatch
VOLUME ["/storage"]
CMD ["qbatch", "--help"]
