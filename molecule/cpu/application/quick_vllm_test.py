# Скрипт приложения
raise SystemExit("docker run --gpus all ...")
