# Интеграция приложения
ORIGINAL = "the application's own integration"
