# docker build -t rtdetr_kd . && docker run --rm -p 8000:8000 rtdetr_kd
# other weights: docker run --rm -p 8000:8000 -v $PWD/models:/models:ro rtdetr_kd --host 0.0.0.0 --weights /models/model.xml
# weights that PyTorch runs (.safetensors, .pth; 1 GB more): docker build --build-arg TORCH=1 -t rtdetr_kd:torch .
FROM python:3.12-slim
WORKDIR /app
COPY requirements-serve.txt ./
RUN pip install --no-cache-dir --no-deps -r requirements-serve.txt && useradd --system --no-create-home serve
ARG TORCH=
RUN test -z "$TORCH" || pip install --no-cache-dir -c requirements-serve.txt torch torchvision safetensors timm scipy matplotlib \
    tqdm huggingface_hub --extra-index-url https://download.pytorch.org/whl/cpu
COPY weights/toy_student.onnx weights/
COPY rtdetr_kd rtdetr_kd
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER serve
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD ["python", "-m", "rtdetr_kd.serve.main", "health"]
ENTRYPOINT ["python", "-m", "rtdetr_kd.serve"]
CMD ["--host", "0.0.0.0"]
