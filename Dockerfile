# docker build -t meta-lora . && docker run -p 7860:7860 meta-lora
# With an NVIDIA GPU: docker run --gpus all -p 7860:7860 -e METALORA_BASE=... meta-lora
FROM python:3.11-slim

# OpenCV, which InsightFace imports, needs these two even without a screen.
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*

# Hugging Face's Docker Spaces run as user 1000.
RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user PATH=/home/user/.local/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/user/app

COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user -r requirements.txt
COPY --chown=user . .

ENV METALORA_HOST=0.0.0.0 METALORA_PORT=7860
EXPOSE 7860
CMD ["python", "app.py"]
