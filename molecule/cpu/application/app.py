"""Stands in for the application's page: calls adapter, manager and models as the real one does, with its faults.

Those that matter: a loop leaves the last model's entry in ``config``; a failure keeps one general sentence; a run that
ends in ``st.rerun`` loses every box of ``st.error``.
"""

# ruff: noqa: RUF001  # Russian

import json
from pathlib import Path

import streamlit as st
import yaml
from PIL import Image, ImageDraw, ImageEnhance

PROMPTS = {
    "Только обнаружение": (
        "Perform layout detection only. Identify and locate all layout elements in the document without text "
        "recognition. For each element provide:\n\n1. Bbox coordinates: [x1, y1, x2, y2]\n"
        "2. Category from: ['Caption', 'Footnote', 'Formula', 'List-item', 'Page-footer', 'Page-header', 'Picture', "
        "'Section-header', 'Table', 'Text', 'Title']\n"
        "3. Confidence score if available\n\nOutput as JSON array of detected layout elements."
    ),
    "Простое OCR": "Extract all text from this image.",
}

state = st.session_state
state.setdefault("messages", [])
config = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))

with st.sidebar:
    page = st.radio("Режим", ["OCR", "Чат"])
    local = st.checkbox("Transformers")
    if local:
        model_key = st.selectbox("Модель", list(config["models"]))
        limit = config["models"][model_key].get("context_length", 4096)
    else:
        from single_container_manager import SingleContainerManager
        from vllm_streamlit_adapter import VLLMStreamlitAdapter

        if "adapter" not in state:
            state.adapter = VLLMStreamlitAdapter()
        if "manager" not in state:
            state.manager = SingleContainerManager()
        assert hasattr(state.manager, "_build_docker_command")
        status = state.manager.get_system_status()
        if status["active_model"]:
            st.success(f"Активная модель: {status['active_model_name']}, {status['total_memory_usage']} ГБ")
        else:
            st.warning("Нет активной модели")
        names = []
        for model_key, config in state.manager.models_config.items():
            names.append(f"{model_key}: {config['display_name']} ({config['memory_gb']} ГБ, порт {config['port']})")
        st.selectbox("Модель", names)
        if model_key != status["active_model"] and st.button("Переключиться"):
            st.error(state.manager.start_single_container(model_key)[1])
        active = state.adapter.container_manager.get_active_model()
        model_path = state.adapter.container_manager.models_config[active]["model_path"]
        limit = state.adapter.get_model_max_tokens(model_path)
    max_tokens = st.number_input("Макс. токенов", 100, limit, min(limit, 1024))


def read(image, prompt):
    """Return what the model reads, or None."""
    if local:
        from models.model_loader import ModelLoader

        return ModelLoader.load_model(model_key).process_image(image, prompt=prompt)
    manager = state.adapter.container_manager
    healthy, message = manager.check_api_health(manager.models_config[manager.get_active_model()]["port"])
    if not healthy:
        st.info(message)
        st.stop()
    result = state.adapter.process_image(image, prompt, model_path, max_tokens)
    st.error("Это сообщение теряется")
    return result["text"] if result and result["success"] else None


uploaded = st.file_uploader("Изображение", type=config.get("ocr", {}).get("supported_formats", []))
image = Image.open(uploaded) if uploaded else None
if page == "OCR":
    kind = st.selectbox("Тип документа", list(config.get("document_templates", {})))
    if image and st.button("Извлечь текст"):
        enhanced = ImageEnhance.Contrast(image).enhance(1.2)
        text = read(enhanced, "Extract all text from this passport document, preserving structure and formatting")
        state.result = "Ошибка обработки" if text is None else text
        st.rerun()
    if "result" in state:
        st.code(state.result, language="text")
        for field in config.get("document_templates", {}).get(kind, {}).get("fields", []):
            st.text_input(field)
else:
    asked = st.chat_input("Вопрос")
    for label, prompt in PROMPTS.items():
        if st.button(label):
            asked = prompt
    if image and asked:
        state.messages.append({"role": "user", "content": asked})
        text = read(image, asked)
        if text is not None and "сколько" in asked.lower():
            text = f"В тексте примерно {len(text.split())} слов."
        state.messages.append({"role": "assistant", "content": text or "❌ Ошибка обработки через vLLM"})
        st.rerun()
    for message in state.messages:
        with st.chat_message(message["role"]):
            st.text(message["content"])
            if message["content"].startswith("[{"):
                drawn = image.convert("RGB")
                cells = json.JSONDecoder().raw_decode(message["content"])[0]
                for cell in cells:
                    ImageDraw.Draw(drawn).rectangle(cell["bbox"], outline="red")
                st.image(drawn, caption=f"Рамок: {len(cells)}")
