# Клиент приложения
ORIGINAL = "the application's own client"
