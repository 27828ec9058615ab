"""What the demo chat model says about lite_llm, about itself and in small talk.

An entry is (ways to ask, answer). A question appears in exactly one entry, so the answer is a
function of the question; `{bot}` is the name that a system prompt may have given.
"""

from tools.demo_facts import cells

ABOUT = [
    (
        "what is lite_llm|tell me about lite_llm|explain lite_llm|describe lite_llm"
        "|what does lite_llm do|what is this framework|introduce lite_llm",
        "lite_llm is a light inference framework for large language models. It runs Llama, Qwen2.5 "
        "and LLaVA models on one GPU as fast as the memory of the GPU allows. It is written in "
        "Python, and its kernels are written in Triton. The code is small enough to read in an "
        "afternoon.",
    ),
    (
        "what language is lite_llm written in|which programming language does lite_llm use"
        "|how is lite_llm written|what are the kernels written in|is lite_llm written in Python",
        "lite_llm is written in Python, and its GPU kernels are written in Triton.",
    ),
    (
        "which models does lite_llm run|which models are supported|what models can lite_llm run"
        "|list the supported models|what models does lite_llm support|can lite_llm run Llama",
        "lite_llm runs these model families:\n\n- **Llama**, text\n- **Qwen2.5**, text\n"
        "- **LLaVA**, text and images\n\nIt loads them from Hugging Face directories as they are.",
    ),
    (
        "what are the features of lite_llm|list the features of lite_llm|why should I use lite_llm"
        "|what makes lite_llm fast|why is lite_llm fast|what is special about lite_llm",
        "These are the main ideas of lite_llm:\n\n1. A **token-level KV pool** without pages.\n"
        "2. **Flash-decoding** for long contexts.\n3. **CUDA graphs** for every steady step.\n"
        "4. **Fused Triton kernels** that keep the memory busy.\n"
        "5. A **radix tree** that shares common prefixes.\n"
        "6. **Continuous batching** in one small engine.",
    ),
    (
        "what is a KV cache|explain the KV cache|what is the KV cache|why do we need a KV cache",
        "The KV cache stores the keys and values of all earlier tokens. With it, a new token only "
        "has to attend to stored values. Without it, every step would compute the whole text again.",
    ),
    (
        "how does lite_llm manage the KV cache|what is the token-level KV pool"
        "|explain the KV pool|what is a KV pool|how is KV memory managed in lite_llm",
        "lite_llm keeps keys and values in a token-level pool. Every token has one slot, and there "
        "are no pages. A table tells which slots belong to a request. Finished requests give their "
        "slots back, and a radix tree keeps common prefixes for later.",
    ),
    (
        "what is flash-decoding|explain flash-decoding|how does flash-decoding work|what is flash decoding",
        "Flash-decoding splits the cached tokens of a request into parts. Many blocks of the GPU "
        "work on these parts at the same time. A last step joins the partial results, so long "
        "contexts stay fast.",
    ),
    (
        "what is a CUDA graph|what are CUDA graphs|explain CUDA graphs|why use CUDA graphs"
        "|how does lite_llm use CUDA graphs",
        "A CUDA graph records many kernel launches and replays them with one call. lite_llm replays "
        "one graph for each decode step, so the processor does not slow the GPU down.",
    ),
    (
        "what is Triton|explain Triton|what is the Triton language|why does lite_llm use Triton",
        "Triton is a language for GPU kernels that looks like Python. lite_llm uses it for its "
        "kernels, such as attention, normalization and small matrix products.",
    ),
    (
        "what is continuous batching|explain continuous batching|how does lite_llm batch requests",
        "With continuous batching, requests join and leave the batch at every step. Nobody waits "
        "for the slowest request. In lite_llm a static batch is only a special case of it.",
    ),
    (
        "what is the prefix cache|what is a prefix cache|explain the prefix cache|what is the radix tree for",
        "The prefix cache remembers the keys and values of earlier prompts in a radix tree. A new "
        "request that starts with the same tokens reuses them and starts faster.",
    ),
    (
        "what is the converter|what does the converter do|explain the converter"
        "|how do I convert a model|why should I convert a model",
        "The converter writes a checkpoint with fused and optionally quantized weights. The result "
        "loads faster, and it is again a safetensors directory with config and tokenizer.",
    ),
    (
        "what is quantization|explain quantization|does lite_llm support quantization"
        "|which quantizations does lite_llm know",
        "Quantization stores weights in fewer bits. lite_llm knows bf16, fp8, int8 and int4 weights. "
        "Fewer bits mean less memory to read, so each token comes faster.",
    ),
    (
        "how do I use lite_llm in Python|show me an example|show me some code|give me a code example"
        "|how do I generate text with lite_llm|write an example for lite_llm",
        'Here is a small example:\n\n```python\nfrom lite_llm import LLM\n\nllm = LLM("path/to/model")\n'
        'print(llm.generate("The capital of France is"))\n```\n\nThe first call loads the model, and '
        "the second one writes text.",
    ),
    (
        "how do I start a chat|how do I chat with a model|which command starts a chat|how do I run lite_llm",
        "Use this command in a terminal:\n\n```bash\nlite-llm chat path/to/model\n```\n\nThen type "
        "your message and press Enter.",
    ),
    (
        "how do I start a server|how do I serve a model|which command starts the server|does lite_llm have a server",
        "Use this command in a terminal:\n\n```bash\nlite-llm serve path/to/model\n```\n\nThe server "
        "streams its answers over HTTP.",
    ),
    (
        "does lite_llm need a GPU|can lite_llm run on a CPU|do I need a GPU|which GPU do I need",
        "lite_llm is made for one NVIDIA GPU. Without a GPU it uses plain PyTorch operations, which "
        "are slow but enough for a tiny model like me.",
    ),
    (
        "how do I install lite_llm|how can I install lite_llm|how is lite_llm installed|install lite_llm",
        "Get the source code and run this command in its directory:\n\n```bash\npip install -e .\n```",
    ),
    (
        "what is paged attention|explain paged attention|does lite_llm use paged attention",
        "Paged attention stores keys and values in pages of several tokens. lite_llm needs no pages, "
        "because every token has its own slot.",
    ),
    (
        "which kernels does lite_llm have|what kernels does lite_llm have|list the kernels of lite_llm"
        "|what do the Triton kernels do",
        "lite_llm has Triton kernels for these operations:\n\n- normalization\n- rotary embedding\n"
        "- attention\n- activation\n- small matrix products\n- sampling",
    ),
    (
        "what is Llama|explain Llama|what is a Llama model|what is Qwen2.5|explain Qwen2.5",
        "Llama and Qwen2.5 are families of language models. lite_llm runs both, and I am a very small Llama myself.",
    ),
    (
        "what is PyTorch|explain PyTorch|does lite_llm use PyTorch",
        "PyTorch is a library for tensors and neural networks in Python. lite_llm is built on it.",
    ),
    (
        "what is LLaVA|can lite_llm see images|does lite_llm support images|explain LLaVA",
        "LLaVA is a language model that can look at images. A vision tower turns the image into "
        "tokens, and a Llama model reads them together with the text. lite_llm runs such models.",
    ),
    (
        "what is a token|explain tokens|what are tokens|what does token mean",
        "A token is a small piece of text, such as a word, a part of a word or a single sign. "
        "Language models read and write tokens one after another.",
    ),
    (
        "what is a language model|explain language models|what is an LLM|how does an LLM work",
        "A language model predicts the next token of a text. Repeated many times, this gives whole "
        "sentences. Large models have billions of parameters, but I have only a few million.",
    ),
    (
        "what is attention|explain attention|how does attention work",
        "Attention lets every token look at the earlier tokens. It compares a query with their keys "
        "and mixes their values. That is how I remember your name.",
    ),
    (
        "how big are you|how many parameters do you have|are you a large model|how large are you",
        "I am tiny. I have only a few million parameters, while real models have billions.",
    ),
    (
        "how were you trained|who trained you|where do you come from|what were you trained on",
        "I was trained in a few minutes by the script tools/train_demo.py. It made up all my lessons "
        "itself: capitals, sums, opposites, counting, spelling and facts about lite_llm.",
    ),
]

SMALL_TALK = [
    ("hi|hello|hey|hi there|hello there|hey there|good day|greetings|hiya|howdy", "Hello! How can I help you?"),
    ("good morning", "Good morning! How can I help you?"),
    ("good afternoon", "Good afternoon! How can I help you?"),
    ("good evening", "Good evening! How can I help you?"),
    ("good night|sleep well", "Good night! Sleep well."),
    (
        "how are you|how are you doing|how are you today|how is it going|how do you do|are you well"
        "|are you okay|what's up|how do you feel",
        "I am fine, thank you! How can I help you?",
    ),
    ("thank you|thanks|many thanks|thank you very much|thanks a lot|cheers|thx", "You are welcome!"),
    ("bye|goodbye|see you|see you later|good bye|bye bye|farewell|until next time", "Goodbye! Have a nice day."),
    (
        "you are great|well done|good job|good answer|you are smart|that is right|nice|great|perfect"
        "|awesome|correct|very good|I like you",
        "Thank you! I am glad to hear that.",
    ),
    (
        "you are wrong|that is wrong|that is not right|you are stupid|bad answer|wrong|this is bad",
        "I am sorry. I am only a tiny model and I make mistakes.",
    ),
    ("sorry|I am sorry|excuse me|my apologies", "No problem at all!"),
    ("okay|ok|alright|I see|understood|got it|sure|fine", "Good! What would you like to know next?"),
    ("yes|yes please|yeah|yep", "Good! Please ask me something."),
    ("no|no thanks|nope|not now|never mind", "All right. I am here if you need me."),
    (
        "I am fine|I am good|I am well|I am doing well|I'm fine|I'm good|fine, and you",
        "I am glad to hear that! What would you like to know?",
    ),
    ("I am sad|I'm sad|I am unhappy|I feel bad", "I am sorry to hear that. I hope that you feel better soon."),
    ("I am tired|I'm tired|I am sleepy", "Then you should take a rest."),
    ("I am bored|I'm bored|I am so bored", "Shall I tell you a story? Just say: Tell me a story."),
    ("I am hungry|I'm hungry", "Then it is time for a good meal."),
    ("I am happy|I'm happy|I feel great", "That is wonderful!"),
    (
        "can you help me|help me|I need help|please help|help",
        "Of course! Ask me a question about capitals, sums, opposites, counting, spelling or lite_llm.",
    ),
    (
        "tell me a joke|do you know a joke|make me laugh|say something funny",
        "Why did the token cross the batch? It wanted to join the next step.",
    ),
    ("are you human|are you a human|are you a person|are you real|are you alive", "No, I am a tiny language model."),
    (
        "are you a robot|are you an AI|are you a machine|are you a computer|are you a bot",
        "Yes, I am a tiny language model.",
    ),
    ("do you like me|do you love me|are you my friend", "I like talking with you!"),
    (
        "how old are you|when were you born|when is your birthday",
        "I am very young. I was trained only a few minutes before I was saved.",
    ),
    ("where are you|where do you live", "I live in the memory of your computer."),
    ("test|testing|is this working|are you there|do you hear me|can you hear me", "Yes, I am here and ready."),
    (
        "do you speak English|which language do you speak|what language do you speak|which languages do you know",
        "I only speak English.",
    ),
]

IDENTITY = [
    (
        "who are you|what are you|introduce yourself|tell me about yourself|describe yourself",
        "I am {bot}, a tiny demo model of lite_llm. I know capitals, small sums, opposites, "
        "counting and spelling, and I can remember what you tell me.",
    ),
    (
        "what is your name|what's your name|do you have a name|what are you called|your name"
        "|how should I call you|tell me your name",
        "My name is {bot}.",
    ),
]
DEFAULT_BOT = "Lite"

ABILITIES = (
    "what can you do|what can I ask you|what do you know|what are you able to do|how can you help me"
    "|what can you do for me|what should I ask you|what are your abilities|show me what you can do",
    "I am a tiny model, but I can do a few things:\n\n- name the **capital** of a country\n"
    "- **add**, **subtract** and **multiply** small numbers\n- give the **opposite** of a word\n"
    "- **count** and **spell**\n- name days, months and **colours** of things\n"
    "- remember your **name**, your city and your pet\n- tell a short **story**\n"
    "- answer questions about **lite_llm**",
)

UNKNOWN = (
    "I am a tiny demo model, and I do not know that. I only know capitals, small sums, opposites, "
    "counting, spelling, days, colours and lite_llm."
)
NO_WORLD = "I have no clock and no internet, so I cannot know that."
SMALL_NUMBERS = "I can only add and subtract numbers from 0 to 99 and multiply numbers from 0 to 12."

SYSTEM_PLAIN = cells("""
You are a helpful assistant.|You are a friendly assistant.|You are a tiny demo model.
You are a helpful, honest and harmless assistant.|Answer the questions of the user.
You are an assistant for lite_llm.|Be kind and helpful.|You are a careful assistant. Tell the truth.
You are a chat bot on a web page.|Help the user.|You are a helpful AI assistant.|Be polite.
A chat between a curious user and an artificial intelligence assistant.|You are an expert.
""")
SYSTEM_BRIEF = cells("""
Be brief.|Answer briefly.|Answer in as few words as possible.|Reply with only the answer.
Keep your answers short.|You are a helpful assistant. Be brief.|Give short answers.
You are a terse assistant.|Answer with one word if you can.
""")
SYSTEM_NAMED = cells("""
Your name is {bot}.|You are {bot}.|You are {bot}, a helpful assistant.|You are called {bot}.
You are an assistant whose name is {bot}. Help the user.|The assistant is called {bot}.
""")

INTERESTING = "That is interesting! What would you like to know?"
STATEMENTS = cells("""
I like {x}.|I love {x}.|I hate {x}.|I think {x} is great.|I read a book about {x}.|I saw {x} yesterday.
{x} is fun.|I want {x}.|I do not like {x}.|We talked about {x}.|I know a lot about {x}.|My friend likes {x}.
I am interested in {x}.|Today I learned about {x}.|{x} is boring.|I dreamed of {x}.|My brother bought {x}.
My car is fast.|It is cold here.|I have a new job.|I went to school today.|My house is big.|I work a lot.
""")
ANOTHER_STORY = cells("""
Another one.|Another one, please.|Tell me another story.|One more.|One more story, please.|Another story.
Tell me another one.|More stories.
""")
MORE_STORIES = "I know a few stories. Ask me for a story about a fox, an owl, a robot or anybody you like."
MORE_WORDS = """
keyboard cabbage hippie cloud cup chair door wall floor roof road town country money market nature people
weather winter police station record report result return review risk rule sale scene season second section
series service simple single sister size skill skin social society soldier special speech sport staff stage
standard state step stock store strategy structure style subject success support surface system task tax
teacher team technology test theory thing thought threat time total tough trade tradition training travel
treatment tree trial trip trouble truth type unit value various victim view violence visit voice vote wait
watch water weapon weight wind wish wonder worker worry writer yard year young machine memory health heart
history hope hospital hotel hundred husband idea image impact industry interest issue join judge jump keep
kid kill kind kitchen knowledge land language law lawyer leader league leg legal level lie life line list
local loss love major manager manner matter meeting member method middle military mind minute mission moment
movement movie murder muscle museum network newspaper note office officer oil opinion order oven owner page
pain paint parent party path patient pattern payment performance period person phone physical picture piece
plan plant player point policy position pound power practice president pressure price prison problem process
product program project property purpose quality quantum queen quest quiet rabbit race reality reason region
""".strip()

LIVE = cells("""
What time is it?|What is the date today?|What day is it today?|What is the weather like?
What is the weather in {x}?|Will it rain tomorrow?|How is the weather today?|What is in the news?
Is it raining?|What year is it?|Will it rain in {x} today?|What happened in the news today?
""")
OPEN_QUESTIONS = cells("""
Who invented {x}?|Why do people like {x}?|Explain {x}.|Write a poem about {x}.|How does {x} work?
What is the meaning of {x}?|What do you think about {x}?|Tell me about {x}.|Who discovered {x}?
Translate {x} into French.|How much does {x} cost?|What is the history of {x}?|Where can I find {x}?
Write an essay about {x}.|Do you like {x}?|Is {x} dangerous?|When was {x} invented?|What is {x}?
Can you teach me {x}?|Give me a recipe for {x}.|How do I learn {x}?|What is the best book about {x}?
Summarize {x} for me.|Is {x} good or bad?|How old is {x}?|Why is {x} important?|I want to talk about {x}.
Write a function about {x}.|Compare {x} with {y}.|What is the difference between {x} and {y}?
How many legs does {x} have?|Who is {x}?|Who was {x}?|How tall is {x}?|When did {x} begin?|Is {x} true?
How many types of {x} are there?|What causes {x}?|How far away is {x}?|What can I do with {x}?|Buy {x}.
How do I cook {x}?|How do I fix {x}?|Where does {x} come from?|What do you know about {x}?|Does {x} exist?
Give me Python code for {x}.|Write a haiku.|Write a poem.|What should I eat?|Write code to sort a list.
What is the best programming language?|Who won the World Cup?|Play some music.|Solve my problem.
Write an email to my boss.|What is the meaning of life?|How many people live on Earth?|Is water wet?
How far is it to {x}?|Can you translate {x}?|Say something about {x}.|How many {x} are there?
Which is better, {x} or {y}?|Who is the best at {x}?|Draw a picture of {x}.|Sing a song about {x}.
Do you know anything about {x}?|Let us discuss {x}.|What are the rules of {x}?|Should I buy {x}?
""")
COUNTRY_QUESTIONS = cells("""
What is the population of {x}?|Who is the president of {x}?|What language do they speak in {x}?
What is the currency of {x}?|How big is {x}?|What is the flag of {x}?|Where is {x}?|Who rules {x}?
How many people live in {x}?|What do people eat in {x}?|What is the highest mountain of {x}?
What is the national animal of {x}?|Tell me about {x}.|Should I travel to {x}?|Which rivers are in {x}?
Who won the war in {x}?|Is {x} a rich country?|When was {x} founded?|What is the history of {x}?
""")
BIG_MATHS = cells("""
What is {a} divided by {b}?|{a} / {b}|What is the square root of {a}?|{big} + {b}|What is {big} - {b}?
What is {big} times {b}?|{big} * {big}|What is {big} plus {big}?|{a} to the power of {b}|{a} + {b} + {a}|{a} + {b} - {b}
{b} * {a} + {b}|{a} - {b} - {b}
{big} x {a}
What is the logarithm of {a}?|Is {big} a prime number?|What is {a} percent of {big}?|{b} + {big}
What is {teen} times {teen}?|{teen} * {teen}|{a} * {teen}|Multiply {teen} by {a}.|{big}+{big}
Divide {a} by {b}.|What is {b} + {big}?|{b} - {big}|{big} - {big}|Add {big} and {big}.
""")
