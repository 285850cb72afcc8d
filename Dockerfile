# docker build -t rtdetr_kd . && docker run --rm -p 8000:8000 rtdetr_kd
# other weights: docker run --rm -p 8000:8000 -v $PWD/models:/models:ro rtdetr_kd --weights /models/model.xml --host 0.0.0.0
FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY rtdetr_kd rtdetr_kd
RUN pip install --no-cache-dir -e '.[serve]' && useradd --system --no-create-home serve
COPY weights/toy_student.onnx weights/
ENV MPLCONFIGDIR=/tmp
USER serve
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
ENTRYPOINT ["python", "-m", "rtdetr_kd.serve"]
CMD ["--host", "0.0.0.0"]
