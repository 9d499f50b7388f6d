"""Words that visitors use and that no caption of the training holds: one token each in place of one a letter.

The model has no idea of them. Spelled out letter by letter, three of them would fill a prompt; as tokens whose
embedding is the mean of those that were learned they leave the rest of the sentence its room.
"""

WORDS = """
about above abstract across action adult aerial after afternoon against airport alien all alley alone along ancient
angel angry animated anime another antique apartment apple arm armour army around art artist astronaut at attic autumn
avocado baby backyard bag baker bakery balcony ball balloon banana band banner bar barn baseball basket basketball
bath bathroom battle bay beach beans bear beard bearded beautiful bed bedroom beer behind being bell below bench
beneath beside best between beyond big birthday biscuit bite black blanket blonde bloom blossom blue blurred blurry
board body bonfire book books boots bottom bowl box boy boys branch brass bread breakfast breed bridge bright broken
bronze brother brown brush bucket building buildings bush busy butter butterfly by cabin cable cafe cage cake calm
camel camera camp campfire can candle canoe canvas canyon cap cape captain card carpet carriage carrot carrying
cartoon carved castle catching caught cave ceiling celebration centre century ceramic chasing cheerful cheese chef
cherry chess chicken child children chocolate christmas church cinema cinematic circle circus city class classic clay
clean clear cliff climbing clock close closeup cloth clothes cloud clouds cloudy clown coast coat coffee coin cold
collar colorful colour colourful coloured comic computer concept concrete cook cookie cooking copper coral corner
costume cosy cottage cotton couple courtyard cowboy cozy crab cracked crayon cream creature crowd crown crystal cube
cup cupboard curtain curved cut cute cyberpunk daisy dance dancer dancing dark dawn day daylight deer deep delicious
depth desert desk detail detailed dessert diamond digital dining dinner dinosaur dirt dirty distance dock doctor doll
dolphin donut door doorway dragon dramatic drawing dreamy dress dressed drink drinking drive driver driving drone drum
dry duck dusk dust dusty eagle early earth east eating egg elderly electric elegant elephant emerald empty engine
engraving epic evening every expensive explosion eye eyes fabric face fairy fall falling family famous fancy fantasy
far farm farmer fast fat father feather feeding female fence few fighting film fine fire fireplace fireworks fish
fisherman fishing flag flame floating floor flower flowers flying fog foggy food foot football for foreground forest
fork fountain four fox frame french fresh friend friends frog from front frozen fruit full fun funny fur furry
futuristic galaxy game garage garden gate ghost giant ginger giraffe girl girls glass glasses glowing goat gold golden
golf good gorilla gothic graffiti grand grandmother grapes gray great green grey ground group guitar hair hairy half
hall hand hands hanging happy harbour hat having he head heart heavy hedgehog helicopter helmet her herd hero hidden
high highway hill hills him his historic hold holding hole holiday home honey horizon hot hotel hour huge human hungry
hunting husband ice icon illustration image in indoor indoors industrial ink inside insect into iron is island it its
jacket japanese jar jazz jeans jewel joyful juice jumping jungle kangaroo key kid kids king kiss kitchen kite knight
knife knitted koala lady lake lamp landscape lantern laptop large last late laughing lavender leaf leather leaves left
leg lemon lens leopard letter library light lighthouse lighting lightning lights like line lion lips little living
lizard lobster log long looking lots love low lunch luxury lying macro made magic magical making male man mansion many
maple marble market married martian mask massive master meat medieval meeting men metal middle midnight military milk
mini miniature mirror mist misty modern monkey monster moon moonlight morning moss mother mountain mountains mouse
moving mud museum mushroom music musician mystical narrow nature near neon nest new night nose oak ocean of office oil
old olive open orange orchard orchestra other out outdoor outdoors outside over owl page paint painted painter
painting pair palace palm panda paper parade park parked parking parrot part party pasta past pastel path pattern
peaceful peach pear pen pencil penguin people perfect photo photographer photography photorealistic piano picnic pie
piece pier pig pile pillow pilot pineapple pink pirate pizza place plain plane planet plants plastic plate playground
playing plaza pond pool poor poppy porcelain porch portrait poster potato pottery pouring powerful pretty prince
princess professional puddle pumpkin purple puzzle pyramid quality queen quiet rabbit race racing radio railway rain
rainbow rainy ranch raspberry rat raw reading real realistic rear red reflection refrigerator render rendering resting
restaurant retro rice rich ride rider riding right ring river roast robot rock rocket rocks rocky roof room rope rose
roses rough round row ruins running rural rustic sad sailing sailor salad sandwich scary scene school science
sculpture seagull seashore seat serene shadow shadows shallow shark sharp she shell shelf shining shiny shirt shoes
shop shore short shot shoulder show side sidewalk silhouette silk silver singer singing single sister sitting skate
skateboard skating sketch ski skiing skirt skull skyline skyscraper sleeping sleepy slice slow small smile smiling
smoke smooth snake snowman snowy soccer soft soldier some south space spaceship spices spider spoon sport sports
spring square squirrel stadium staircase stairs standing star stars starry station statue steam steampunk steel stick
still stone stormy storm straw strawberry stream streets striped strong studio stuffed style subway suit suitcase
summer sun sunflower sunglasses sunlight sunny sunrise sunset surf surfer surfing surreal sushi sweater sweet swimming
swimsuit sword symmetrical tail taking tall tea teacher teapot teddy teenager telephone temple tennis tent texture
than that the their them there they thick thin this three throne through tie tiger time tiny to toast together tomato
top tower town toy toys track tractor tradition traditional traffic tram travel tree trees tropical trousers truck
tulip tunnel turtle twin two umbrella under underwater unicorn uniform up urban valley van vase vegetables venice very
vibrant victorian view viking village vineyard vintage violet violin walking wall wallpaper walls warm warrior watch
watching water watercolor watercolour waterfall wave waves wearing wedding western wet whale wheat wheel wheels while
white wide wild wildlife wind window windmill windows windy wine wings winter wise witch wizard wolf woman women
wonderful wood wooden woods wool work worker working world worn writing yacht yard year yellow yoga young zebra zoo
""".split()
